"use strict";

/* A COCO run-length encoding -> one byte a pixel, row by row. */
function decodeRle(rle) {
  const [height, width] = rle.size, runs = [], text = rle.counts;
  for (let at = 0; at < text.length;) {
    let value = 0, shift = 0, byte;
    do {
      byte = text.charCodeAt(at++) - 48;
      value |= (byte & 31) << shift;
      shift += 5;
    } while (byte & 32);
    if (byte & 16) value |= -1 << shift;
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  const pixels = new Uint8Array(height * width);
  let place = 0;
  runs.forEach((run, i) => {
    for (const end = place + run; place < end; place++) {
      if (i % 2) pixels[(place % height) * width + Math.floor(place / height)] = 1;
    }
  });
  return pixels;
}

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/* A picture with masks over it; masks are {pixels, area, colour}, in the order of `draw`. */
class Stage {
  constructor(picture, [height, width], masks, caption) {
    this.masks = masks;
    this.canvas = element("canvas", {width, height});
    const image = element("img", {src: picture, alt: caption});
    this.figure = element(
      "figure", {}, element("div", {className: "stage"}, image, this.canvas),
      element("figcaption", {textContent: caption}));
    this.draw(null);
  }

  /* Fills and outlines every mask; with an active one the others fade and the rest darkens. */
  draw(active) {
    const {width, height} = this.canvas, context = this.canvas.getContext("2d");
    const out = context.createImageData(width, height), data = out.data;
    const paint = (at, [r, g, b], alpha) => {
      const under = data[4 * at + 3] / 255, all = alpha + under * (1 - alpha);
      [r, g, b].forEach((value, c) => {
        data[4 * at + c] = (value * alpha + data[4 * at + c] * under * (1 - alpha)) / all;
      });
      data[4 * at + 3] = 255 * all;
    };
    if (active !== null) {
      for (let at = 0; at < width * height; at++) paint(at, [0, 0, 0], 0.45);
    }
    const order = this.masks.map((_, i) => i).sort((a, b) => this.masks[b].area - this.masks[a].area);
    for (const i of order) {
      if (active !== null && i !== active) continue;
      const {pixels, colour} = this.masks[i];
      if (i === active) {
        for (let at = 0; at < pixels.length; at++) if (pixels[at]) data[4 * at + 3] = 0;
      }
      for (let at = 0; at < pixels.length; at++) {
        if (!pixels[at]) continue;
        const x = at % width, y = (at - x) / width;
        const inside = x > 0 && x < width - 1 && y > 0 && y < height - 1 && pixels[at - 1]
          && pixels[at + 1] && pixels[at - width] && pixels[at + width];
        paint(at, colour, inside ? 0.34 : 1);
      }
    }
    context.putImageData(out, 0, 0);
    this.canvas.dataset.active = active === null ? "" : String(active);
  }

  /* Position in `masks` of the smallest mask under the pointer, or null. */
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * this.canvas.width);
    const y = Math.floor((event.clientY - box.top) / box.height * this.canvas.height);
    let found = null;
    this.masks.forEach((mask, i) => {
      const hit = mask.pixels[y * this.canvas.width + x];
      if (hit && (found === null || mask.area < this.masks[found].area)) found = i;
    });
    return found;
  }
}

function readyMask(rle, colour) {
  const pixels = decodeRle(rle);
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return {pixels, area: pixels.reduce((a, b) => a + b, 0), colour: parts};
}

/* Shows a trace in `root`: picture(s), text, IoUs. `view` is what vrt_jax.viewer.view makes. */
function showTrace(root, view, picture) {
  const predicted = new Stage(
    picture, view.size, view.masks.map((m) => readyMask(m.rle, m.colour)), "predicted masks");
  const places = new Map(view.masks.map((m, place) => [m.index, place]));
  const spans = [];
  const activate = (place) => {
    predicted.draw(place);
    spans.forEach((span) => span.classList.toggle("active", Number(span.dataset.place) === place));
  };
  const text = element("div", {className: "text"});
  for (const section of view.sections) {
    if (section.heading) text.append(element("h4", {textContent: section.heading}));
    const paragraph = element("p");
    for (const [words, index] of section.pieces) {
      if (index === undefined || !places.has(index)) {
        paragraph.append(words);
        continue;
      }
      const place = places.get(index), mask = view.masks[place];
      const span = element(
        "span", {className: "mention", tabIndex: 0, textContent: words.trim(), role: "button"},
        element("span", {className: "badge", textContent: mask.badge}));
      span.dataset.place = place;
      span.style.setProperty("--c", mask.colour);
      span.setAttribute("aria-label", `${mask.label}: show its mask`);
      span.onpointerenter = span.onfocus = span.onclick = () => activate(place);
      span.onpointerleave = span.onblur = () => activate(null);
      spans.push(span);
      paragraph.append(words.match(/^\s*/)[0], span);
    }
    if (paragraph.textContent.trim()) text.append(paragraph);
  }
  predicted.canvas.onpointermove = predicted.canvas.onpointerdown = (event) => {
    const place = predicted.under(event);
    if (String(place ?? "") !== predicted.canvas.dataset.active) activate(place);
  };
  predicted.canvas.onpointerleave = () => activate(null);
  const pictures = element("div", {className: "pictures"}, predicted.figure);
  const parts = [pictures, text];
  if (view.targets) {
    const colour = {reasoning: "#2563eb", answer: "#e07b00"};
    const stage = new Stage(
      picture, view.size, view.targets.map((t) => readyMask(t.rle, colour[t.role])),
      "true masks: evidence blue, answer orange");
    pictures.append(stage.figure);
    const list = element("ul", {className: "ious"});
    view.targets.forEach((target, place) => {
      const item = element("li", {
        className: target.iou > 0.5 ? "hit" : "miss", tabIndex: 0,
        textContent: `${target.role === "answer" ? "answer" : "evidence"} IoU ${target.iou.toFixed(2)}`,
      });
      item.onpointerenter = item.onfocus = () => stage.draw(place);
      item.onpointerleave = item.onblur = () => stage.draw(null);
      list.append(item);
    });
    parts.splice(1, 0, list);
  }
  root.replaceChildren(element("div", {className: "trace"}, ...parts));
}
