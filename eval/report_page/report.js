"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
const list = document.getElementById("list"), detail = document.getElementById("detail");
const filters = ["tag", "kind", "order", "words"].map((name) => document.getElementById(name));
let shown = [], chosen = null;

function kindLabel(kind) {
  const style = kind === "right" ? "kind good" : "kind bad";
  return element("span", {className: style, textContent: kind});
}

/* Fills the list with the samples that pass the filters, and keeps the chosen one if it is there. */
function refresh() {
  const [tag, kind, order, words] = filters.map((node) => node.value);
  const wanted = words.trim().toLowerCase();
  shown = report.samples.filter((s) =>
    (!tag || s.tags.includes(tag)) && (!kind || s.kinds.includes(kind))
    && (!wanted || (s.key + " " + s.question).toLowerCase().includes(wanted)));
  const sign = {worst: 1, best: -1, data: 0}[order];
  if (sign) shown.sort((a, b) => sign * (a.quality - b.quality) || a.number - b.number);
  list.replaceChildren(...shown.map((sample, place) => {
    const row = element(
      "div", {className: "row"}, element("span", {textContent: sample.tags.join(" ") || sample.key}),
      element("span", {textContent: `mean IoU ${sample.quality.toFixed(2)}`}));
    const item = element("li", {id: `sample-${sample.number}`, role: "option"},
      element("div", {textContent: sample.question}), row);
    item.onclick = () => choose(place);
    return item;
  }));
  document.getElementById("count").textContent = `${shown.length} of ${report.samples.length}`;
  const place = shown.indexOf(chosen);
  if (shown.length) choose(place < 0 ? 0 : place, false);
  else { chosen = null; detail.replaceChildren(element("p", {className: "faint", textContent: "No sample passes the filters."})); }
}

function choose(place, scroll = true) {
  chosen = shown[place];
  [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === place)));
  list.setAttribute("aria-activedescendant", `sample-${chosen.number}`);
  if (scroll) list.children[place].scrollIntoView({block: "nearest"});
  const facts = element("p", {className: "facts"}, ...chosen.kinds.map(kindLabel));
  if (chosen.invalid) facts.append(element("span", {textContent: chosen.invalid}));
  facts.append(element("span", {textContent: chosen.key}));
  const root = element("div");
  detail.replaceChildren(element("h3", {textContent: chosen.question}), facts, root);
  showTrace(root, chosen.view, report.pictures[chosen.picture] ?? "data:,");
}

list.onkeydown = (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity}[event.key];
  if (step === undefined || !shown.length) return;
  event.preventDefault();
  choose(Math.min(shown.length - 1, Math.max(0, shown.indexOf(chosen) + step)));
};
filters.forEach((node) => { node.oninput = refresh; });
refresh();
