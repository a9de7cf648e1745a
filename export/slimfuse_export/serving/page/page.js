"use strict";

const find = (id) => document.getElementById(id);
const show = (id, shown = true) => { find(id).hidden = !shown; };
let model = null;
let chosen = null;

function headers(more = {}) {
  const token = find("token").value;
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401) show("access");
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `the service answered ${response.status}`);
  return body;
}

function fail(error) {
  find("error").textContent = error.message;
  show("error");
  show("result", false);
}

const TAKES = {
  "image-classification": "says what an image shows",
  "text-classification": "sorts texts",
  "sentence-embedding": "turns texts into vectors",
  "feature-extraction": "turns its input into vectors",
  "masked-lm": "fills masks in texts",
  "causal-lm": "continues texts",
};

async function open() {
  try {
    model = await call("/model");
  } catch (error) {
    find("task").textContent = "The model is behind a token.";
    if (find("access").hidden || find("token").value) fail(error);
    return;
  }
  show("access", false);
  show("error", false);
  find("name").textContent = model.name;
  document.title = `${model.name} – slimfuse`;
  const classes = model.labels.length ? `, ${model.labels.length} classes` : "";
  find("task").textContent =
    `${model.task}${classes}${model.int8 ? ", INT8" : ""}: ${TAKES[model.task] || ""}`;
  show(model.input === "image" ? "images" : "texts");
  if (model.input === "text") find("text").maxLength = model.limits.characters;
  if (model.mask) find("text-hint").textContent = `${model.mask} is filled in. Ctrl + Enter asks.`;
  show("ask");
}

function choose(file) {
  if (!file) return;
  chosen = file;
  const preview = find("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = `Preview of ${file.name}`;
  preview.hidden = false;
  find("drop-words").textContent = "Drop another image, or choose one";
  ask();
}

function row(label, score, kind = "") {
  const item = document.createElement("li");
  item.className = kind;
  if (score !== null) {
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * score}%`;
    item.append(bar);
  }
  const name = document.createElement("span");
  name.className = "label";
  name.textContent = label;
  item.append(name);
  if (score !== null) {
    const figure = document.createElement("span");
    figure.className = "score";
    figure.textContent = `${(100 * score).toFixed(1)} %`;
    item.append(figure);
  }
  return item;
}

function render(answer, milliseconds) {
  const scores = find("scores");
  let headline = "";
  let plain = "";
  scores.replaceChildren();
  if (answer.scores) {
    headline = answer.label ?? (answer.labels.join(", ") || "none of the labels");
    scores.append(...answer.scores.map((s) => row(s.label, s.score)));
  } else if (answer.masks) {
    headline = answer.text;
    answer.masks.forEach((mask, i) => {
      if (answer.masks.length > 1) scores.append(row(`Mask ${i + 1}`, null, "mask"));
      scores.append(...mask.map((s) => row(s.token, s.score)));
    });
  } else if (answer.embedding) {
    headline = `A vector of ${answer.embedding.length} numbers`;
    plain = answer.embedding.map((x) => x.toFixed(4)).join(" ");
  } else if (answer.features) {
    headline = `${answer.features.length} vectors of ${answer.features[0].length} numbers`;
    plain = answer.features.map((v) => v.map((x) => x.toFixed(4)).join(" ")).join("\n");
  } else if ("finish" in answer) {
    headline = find("text").value + answer.text;
  } else {
    headline = String(answer.value ?? "");
    plain = answer.values ? JSON.stringify(answer.values, null, 2) : "";
  }
  find("headline").textContent = headline;
  find("plain").textContent = plain;
  show("plain", plain !== "");
  const cut = answer.truncated ? " The text was cut to what the model reads." : "";
  find("time").textContent = `${milliseconds.toFixed(1)} ms in the service.${cut}`;
  show("error", false);
  show("result");
}

async function ask() {
  const button = find("send");
  if (button.disabled) return;
  button.disabled = true;
  try {
    let body;
    if (model.input === "image") {
      if (!chosen) throw new Error("Choose an image first.");
      const form = new FormData();
      form.append("files", chosen);
      body = await call("/predict/images", { method: "POST", body: form });
    } else {
      body = await call("/predict", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ inputs: find("text").value }),
      });
    }
    render(body.answers[0], body.milliseconds);
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
}

find("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
find("access").addEventListener("submit", (event) => { event.preventDefault(); open(); });
find("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
});
find("file").addEventListener("change", (event) => choose(event.target.files[0]));
const drop = find("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
}
drop.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
open();
