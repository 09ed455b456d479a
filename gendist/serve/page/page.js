// What the page shows follows from what the server says of a model (GET /models/NAME); no family is known here by name.

const BASE = new URL("..", import.meta.url);
const FORMATS = ["png", "json", "npy", "npz", "arrow", "ndjson"];
const MOST_SLIDERS = 32;
const REACH = 3; // of a slider, in standard deviations of the latents
const PAUSE_MS = 60; // that a slider rests before its picture is asked for
const MOST_VALUES = 40; // of a decoded row that is no image

const $ = (id) => document.getElementById(id);
let model = null; // what the server says of the one that is shown
let drawn = null; // the request that the samples on show are the answer to

// Requests

class Refused extends Error {}

async function ask(path, { signal, ...options } = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(`The server at ${BASE.host} cannot be reached.`);
  }
  if (response.ok) return response;
  if (response.status === 401) $("access").open = true;
  const problem = await response.json().catch(() => null);
  const line = problem?.error ?? `The server answered with status ${response.status}.`;
  throw new Refused(problem?.allowed ? `${line} (allowed: ${problem.allowed})` : line);
}

const pathOf = (...rest) => ["models", ...rest].map(encodeURIComponent).join("/");

function post(verb, format, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal };
  return ask(`${pathOf(model.name, verb)}?format=${format}`, options);
}

// An object in JSON, of parts that are JSON already: digits of a seed beyond 2^53 stay what they are.
const jsonOf = (parts) => `{${Object.entries(parts).map(([name, value]) => `"${name}": ${value}`).join(", ")}}`;

// One task of a kind at a time: a new one ends the one before, and its error is the one that is shown.
const running = new Map();

async function only(kind, task) {
  running.get(kind)?.abort();
  const controller = new AbortController();
  running.set(kind, controller);
  try {
    await task(controller.signal);
    if (running.get(kind) === controller) showError(kind, null);
  } catch (error) {
    if (error.name === "AbortError" || controller.signal.aborted) return;
    showError(kind, error instanceof Refused ? error.message : `The page failed: ${error.message}`);
  }
}

const errors = new Map();

function showError(kind, message) {
  if (message) errors.set(kind, message);
  else errors.delete(kind);
  const [first] = errors.values();
  $("error").textContent = first ?? "";
  $("error").hidden = first === undefined;
}

async function show(image, frame, response, alt) {
  const url = URL.createObjectURL(await response.blob());
  const earlier = image.src;
  image.src = url;
  image.alt = alt;
  await image.decode();
  image.hidden = false;
  frame?.classList.remove("is-waiting");
  if (earlier.startsWith("blob:")) URL.revokeObjectURL(earlier);
}

// curl

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl(verb, format, body) {
  const url = new URL(`${pathOf(model.name, verb)}?format=${format}`, BASE).href;
  const token = sessionStorage.getItem("token") ? ` -H "Authorization: Bearer $GENDIST_TOKEN"` : "";
  const json = "-H 'Content-Type: application/json'";
  return `curl -fsS ${quoted(url)}${token} ${json} -d ${quoted(body)} -o ${verb}.${format}`;
}

// Choosing a model

const option = (text, value) => new Option(text, value);

async function list() {
  await only("models", async (signal) => {
    const { models } = await (await ask("models", { signal })).json();
    $("model").replaceChildren(...models.map(({ name }) => option(name, name)));
    const wanted = new URLSearchParams(location.hash.slice(1)).get("model");
    if (models.some(({ name }) => name === wanted)) $("model").value = wanted;
    if (models.length === 0) throw new Refused("The server has no models.");
    choose();
  });
}

function choose() {
  only("model", async (signal) => {
    const name = $("model").value;
    model = await (await ask(pathOf(name), { signal })).json();
    history.replaceState(null, "", `#${new URLSearchParams({ model: name })}`);
    describe();
    $("main").hidden = false;
    draw($("seed").value);
    showLatents();
    showFigures(); // the samples are asked for first
  });
}

function describe() {
  const { columns, labels, conditions, image_shape: image, takes_sequences: isOfSequences } = model;
  $("about-title").textContent = model.name;
  const what = image && !isOfSequences ? `images of ${image.join(" x ")}` : `${columns.length} feature${columns.length > 1 ? "s" : ""}`;
  const facts = [model.family, isOfSequences ? `sequences of ${what}` : what];
  if (labels.length) facts.push(`${labels.length} labels`);
  if (model.latent_width) facts.push(`${model.latent_width} latents`);
  $("facts").textContent = facts.join(" · ");
  const offered = Object.keys(model.verbs).map((verb) => [verb, "yes"]);
  const rows = [...offered, ...Object.entries(model.not_offered)];
  $("verbs").replaceChildren(
    ...rows.flatMap(([verb, answer]) => [["dt", verb], ["dd", answer]].map(([tag, text]) => element(tag, { textContent: text }))),
  );
  for (const id of ["given", "latent-given"]) {
    const any = id === "latent-given" && model.verbs.decode?.needs_given ? [] : [option("any", "")];
    $(id).replaceChildren(...any, ...conditions.map((label, index) => option(label, index)));
    $(`${id}-field`).hidden = conditions.length === 0;
  }
  $("length-field").hidden = !isOfSequences;
  $("length").disabled = !isOfSequences;
  $("length").value = model.length ?? "";
  $("count").value = isOfSequences ? 5 : image ? 64 : 1000;
  for (const id of ["samples", "decoded", "decoded-values"]) $(id).hidden = true;
  errors.clear();
}

function element(tag, properties, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const givenOf = (id) => ($(id).value === "" ? {} : { given: JSON.stringify(model.conditions[$(id).value]) });

// Samples

function draw(seed) {
  only("samples", async (signal) => {
    const text = seed.trim();
    if (!/^[0-9]*$/.test(text)) throw new Refused(`The seed ${text} is no whole number (allowed: 0 to 2^64 - 1).`);
    const count = $("count").value || "1";
    const asked = { num_samples: count, ...givenOf("given"), ...($("length").disabled ? {} : { length: $("length").value }) };
    $("samples-frame").classList.add("is-waiting");
    const response = await post("sample", "png", jsonOf({ ...asked, seed: text === "" ? "null" : text.replace(/^0+(?=.)/, "") }), signal);
    const used = response.headers.get("X-Gendist-Seed");
    await show($("samples"), $("samples-frame"), response, `${count} samples of ${model.name}, seed ${used}`);
    $("seed").value = used;
    drawn = { ...asked, seed: used };
    showCurl();
    $("status").textContent = `Samples of seed ${used} are shown.`;
  }).finally(() => $("samples-frame").classList.remove("is-waiting"));
}

function showCurl() {
  $("sample-curl").textContent = drawn ? curl("sample", $("format").value, jsonOf(drawn)) : "";
}

// Latents

function showLatents() {
  const isFree = model.has_free_latents && "decode" in model.verbs;
  $("latents").hidden = !isFree;
  if (!isFree) {
    running.get("decode")?.abort();
    return;
  }
  const width = Math.min(model.latent_width, MOST_SLIDERS);
  const more = model.latent_width > width ? ` The first ${width} of ${model.latent_width}; the others stay at 0.` : "";
  $("latents-note").textContent = `Move along a dimension: what is decoded there follows. Most samples come from latents between -2 and 2.${more}`;
  $("sliders").replaceChildren(...Array.from({ length: width }, (_, index) => slider(index)));
  decode();
}

function slider(index) {
  const value = element("output", { textContent: "0.00" });
  const input = element("input", { type: "range", min: -REACH, max: REACH, step: 0.05, value: 0, ariaLabel: `latent ${index}` });
  input.addEventListener("input", () => {
    value.textContent = Number(input.value).toFixed(2);
    decode();
  });
  return element("label", { className: "slider" }, [element("span", { textContent: `z${index}` }), input, value]);
}

function moveTo(choose) {
  for (const input of $("sliders").querySelectorAll("input")) {
    input.value = choose();
    input.parentElement.querySelector("output").textContent = Number(input.value).toFixed(2);
  }
  decode();
}

const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

function decode() {
  only("decode", async (signal) => {
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    if (signal.aborted) return;
    const moved = [...$("sliders").querySelectorAll("input")].map((input) => Number(input.value));
    const latents = [...moved, ...Array(model.latent_width - moved.length).fill(0)];
    const body = jsonOf({ z: `[[${latents.join(", ")}]]`, ...givenOf("latent-given") });
    const format = model.image_shape ? "png" : "json";
    $("decode-curl").textContent = curl("decode", format, body);
    const response = await post("decode", format, body, signal);
    if (format === "png") await show($("decoded"), null, response, `Decoded from latents ${moved.join(", ")}`);
    else showValues((await response.json()).decode[0]);
  });
}

function showValues(row) {
  const rows = model.columns.slice(0, MOST_VALUES).map((name, d) => {
    const value = typeof row[d] === "number" ? row[d].toPrecision(4) : String(row[d]);
    return element("tr", {}, [element("th", { scope: "row", textContent: name }), element("td", { textContent: value })]);
  });
  $("decoded-values").tBodies[0].replaceChildren(...rows);
  $("decoded-values").hidden = false;
}

// Figures of the family

function showFigures() {
  only("figures", async (signal) => {
    const names = model.figures ?? [];
    $("figures-section").hidden = names.length === 0;
    for (const image of $("figures").querySelectorAll("img")) URL.revokeObjectURL(image.src); // of the model before
    $("figures").replaceChildren();
    for (const name of names) {
      const response = await ask(pathOf(model.name, "figures", name), { signal });
      const image = element("img", { hidden: true });
      const caption = element("figcaption", { textContent: name.replaceAll("_", " ") });
      const link = element("a", { target: "_blank", title: "Open in full size" }, [image]);
      $("figures").append(element("figure", {}, [caption, link]));
      await show(image, null, response, `${name} of ${model.name}`);
      link.href = image.src;
    }
  });
}

// What people do

async function copy(button) {
  const text = $(button.dataset.copies).textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($(button.dataset.copies)); // to be copied by hand where the page may not
    button.textContent = "Selected";
  }
  $("status").textContent = button.textContent;
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

$("format").replaceChildren(...FORMATS.map((format) => option(format, format)));
$("token").value = sessionStorage.getItem("token") ?? "";
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("token").value) sessionStorage.setItem("token", $("token").value);
  else sessionStorage.removeItem("token");
  $("access").open = false;
  list();
});
$("model").addEventListener("change", choose);
$("sample-form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw($("seed").value);
});
$("given").addEventListener("change", () => draw($("seed").value));
$("another").addEventListener("click", () => draw(""));
$("format").addEventListener("change", showCurl);
$("latent-given").addEventListener("change", decode);
$("origin").addEventListener("click", () => moveTo(() => 0));
$("anywhere").addEventListener("click", () => moveTo(normal));
for (const button of document.querySelectorAll("[data-copies]")) button.addEventListener("click", () => copy(button));
$("seed").value = "0";
list();
