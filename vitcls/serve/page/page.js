"use strict";

const $ = (id) => document.getElementById(id);
const percent = (p) => (p < 0.001 ? "< 0.1" : p > 0.999 ? "> 99.9" : (p * 100).toFixed(1)) + "\u00a0%";
const count = (n, one, many) => n + " " + (n === 1 ? one : many);
let classes = [];
let explains = false;
let since = null;
let limits = { images: 16, image_bytes: 10 * 2 ** 20 };

// What the server says, or an Error with a line for people.
async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: "Bearer " + token } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server cannot be reached. Try again when it is running.");
  }
  const said = await response.json().catch(() => ({}));
  if (response.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  if (!response.ok && !said.predictions) {
    throw new Error(said.error || "The server answered with status " + response.status + ".");
  }
  return said;
}

function say(error) {
  $("message").textContent = error ? error.message : "";
}

async function begin() {
  try {
    await about();
    say(null);
    $("token-form").hidden = true;
    await learned();
  } catch (error) {
    say(error);
  }
}

// What is served now, which may be another model than before.
async function about() {
  const model = await ask("v1/model");
  classes = model.classes;
  explains = model.explains;
  since = model.since;
  limits = model.limits;
  document.title = model.dataset + " · vitcls";
  $("name").textContent = "What is it? " + model.classes.length + " classes of " + model.dataset;
  const accuracy = model.test.accuracy === undefined ? "" :
    ", " + percent(model.test.accuracy) + " right on " + model.test.num_examples + " test images";
  const served = since ? " Served since " + new Date(since).toLocaleString() + "." : "";
  const sure = model.calibrated ? "Percentages are calibrated." : "Percentages are not calibrated.";
  $("about").textContent = model.model + ", step " + model.checkpoint.step + accuracy + ". " + sure + served;
}

async function learned() {
  const [said, drift] = await Promise.all([ask("v1/feedback"), ask("v1/drift")]);
  $("learned").hidden = false;
  $("learned-words").textContent = said.corrections + said.confirmations === 0 ? "Nothing yet." :
    count(said.confirmations, "answer was", "answers were") + " right, " +
    count(said.corrections, "was", "were") + " corrected, of " + count(said.images, "image.", "images.");
  const alarms = drift.alarms || {};
  const kinds = Object.keys(alarms).filter((kind) => alarms[kind]);
  $("drift-words").hidden = kinds.length === 0;
  $("drift-words").textContent = "Images of late differ from those of the training: " + kinds.join(", ") + ".";
}

// As many at a time as the server takes.
function parcels(files) {
  const found = [[]];
  let bytes = 0;
  for (const file of files) {
    bytes += file.size;
    if (found.at(-1).length === limits.images || (bytes > limits.image_bytes && found.at(-1).length)) {
      found.push([]);
      bytes = file.size;
    }
    found.at(-1).push(file);
  }
  return found;
}

async function send(files) {
  say(null);
  if (files.length === 0) return;
  document.body.setAttribute("aria-busy", "true");
  const bad = [];
  let other = false;
  try {
    for (const images of parcels([...files])) {
      const form = new FormData();
      images.forEach((file) => form.append("file", file, file.name || "image"));
      const said = await ask("v1/predict", { method: "POST", body: form });
      other ||= said.since !== since;
      said.predictions.forEach((answer, i) => {
        if (answer.error) bad.push((answer.file || "The image") + ": " + answer.error);
        else show(answer, images[i]);
      });
    }
    if (other) await about();
  } catch (error) {
    bad.push(error.message.replace(/\.$/, ""));
  } finally {
    document.body.removeAttribute("aria-busy");
  }
  if (bad.length) say(new Error(bad.join("; ") + "."));
}

function show(answer, file) {
  const card = $("answer").content.cloneNode(true).firstElementChild;
  const picture = card.querySelector(".picture img");
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name || "Your image";
  const best = answer.top[0];
  card.querySelector("h2").textContent = best.class + ", " + percent(best.probability);
  card.querySelector(".strange").hidden = !answer.unknown;
  const give = feedback(card, answer, file);
  for (const { class: name, probability } of answer.top) {
    const row = document.createElement("li");
    const isBest = name === best.class;
    const tags = [isBest ? "span" : "button", "span", "span", "i"];
    const [label, track, value, bar] = tags.map((tag) => document.createElement(tag));
    label.textContent = name;
    if (!isBest) {
      label.className = "instead";
      label.title = "That is wrong: it is " + name;
      label.addEventListener("click", () => give("label", name));
    }
    track.className = "track";
    track.setAttribute("aria-hidden", "true");
    bar.style.width = 100 * probability + "%";
    track.append(bar);
    value.textContent = percent(probability);
    row.append(label, track, value);
    card.querySelector(".bars").append(row);
  }
  explanation(card, file);
  $("answers").prepend(card);
}

function feedback(card, answer, file) {
  const right = card.querySelector(".right");
  const [choice, wrong] = [".feedback select", ".wrong"].map((name) => card.querySelector(name));
  classes.filter((name) => name !== answer.top[0].class).forEach((name) => choice.append(new Option(name)));
  const give = async (field, value) => {
    const form = new FormData();
    form.append("id", answer.id);
    form.append(field, value);
    form.append("file", file, file.name || "image");
    try {
      const said = await ask("v1/feedback", { method: "POST", body: form });
      card.querySelector(".thanks").textContent = "Thank you. " + (said.stored ? "Kept: " : "Known already: ") + said.label +
        ". Who wants this forgotten gives the id " + said.client + ".";
      await learned();
    } catch (error) {
      card.querySelector(".thanks").textContent = error.message;
    }
  };
  right.addEventListener("click", () => give("right", "true"));
  choice.addEventListener("change", () => { wrong.disabled = !choice.value; });
  wrong.addEventListener("click", () => give("label", choice.value));
  return give;
}

function explanation(card, file) {
  const details = card.querySelector("details");
  details.hidden = !explains;
  const [words, overlay, method] = [".evidence", ".overlay", "details select"].map((name) => card.querySelector(name));
  const explain = async (name) => {
    words.textContent = "It is looking; the first time takes a while.";
    const form = new FormData();
    form.append("file", file, file.name || "image");
    try {
      const said = await ask("v1/explain?method=" + encodeURIComponent(name), { method: "POST", body: form });
      card.querySelector(".method").hidden = false;
      if (method.length === 0) said.methods.forEach((one) => method.append(new Option(one)));
      method.value = said.method;
      const bytes = Uint8Array.from(atob(said.overlay_png), (letter) => letter.charCodeAt(0));
      overlay.src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
      overlay.alt = "Where the model looks for " + said.class;
      overlay.hidden = false;
      const drop = ({ value }) => percent(value);
      words.textContent = (said.better_than_random ? "Better than random maps" : "No better than random maps: do not trust it") +
        " (p = " + said.p_value.toFixed(2) + "). Without these places it is " + said.class + " with " + percent(said.deletion) +
        " on average (random places: " + drop(said.random_deletion) + "), with them alone " + percent(said.insertion) +
        " (random: " + drop(said.random_insertion) + ").";
    } catch (error) {
      words.textContent = error.message;
    }
  };
  details.addEventListener("toggle", () => details.open && overlay.hidden && explain(method.value));
  method.addEventListener("change", () => explain(method.value));
}

const drop = $("drop");
for (const input of [$("file"), $("photo")]) {
  input.addEventListener("change", () => { send(input.files); input.value = ""; });
}
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => event.relatedTarget || drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  send(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => send(event.clipboardData.files));
document.addEventListener("visibilitychange", () => document.hidden || about().catch(say));
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  begin();
});
begin();
