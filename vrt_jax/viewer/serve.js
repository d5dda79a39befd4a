"use strict";

const form = document.getElementById("form"), file = document.getElementById("image");
const status = document.getElementById("status"), drop = document.getElementById("drop");

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

function readBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

file.onchange = () => {
  document.getElementById("name").textContent = file.files[0]?.name ?? "Choose a picture, or drop one here";
};
drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) {
    file.files = event.dataTransfer.files;
    file.onchange();
  }
};

form.onsubmit = async (event) => {
  event.preventDefault();
  const button = document.getElementById("ask"), start = performance.now();
  button.disabled = true;
  say("The model is looking; the first question of a kind takes longer.");
  try {
    const response = await fetch("predict", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({
        image: await readBase64(file.files[0]),
        question: document.getElementById("question").value,
        thinking: document.getElementById("thinking").checked,
      }),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    showTrace(document.getElementById("answer"), answer.view, answer.picture);
    say(`${answer.view.masks.length} masks in ${((performance.now() - start) / 1000).toFixed(1)} seconds`);
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
};
