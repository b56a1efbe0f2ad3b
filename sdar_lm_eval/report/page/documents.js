"use strict";
// The data, which data.py describes, and the table of documents.

const $ = (id) => document.getElementById(id);
const CHUNK = Number($("data-details-0")?.dataset.chunk ?? 1);
const FLAGS = { right: "Right", wrong: "Wrong", changed: "Changed", invalid: "Invalid", cut: "Cut" };
const MEANINGS = {
  right: "The score is 1",
  wrong: "The score is below 1",
  changed: "The score differs from the first run's",
  invalid: "The filter extracted nothing",
  cut: "The answer ended at the limit of new tokens",
};

let runs = [], tasks = [], documents = [];
let texts = null; // document -> run -> answers, once inflated
let tokens = []; // the texts of tokens, once inflated
let reading = null; // the promise of `texts` and `tokens`
let shown = []; // numbers of the documents that match, in their order
let current = -1; // number of the document that the keyboard is at
let printing = false; // then all rows are drawn, also after a change of the size
const haystacks = []; // number of a document -> the text that the search looks into, in lower case
const chunks = new Map(); // number of a chunk -> the promise of its details
const drawn = new Map(); // number of a document -> its row's element
const view = { q: "", task: "", score: "", run: "", show: new Set(), doc: "", step: null };

// ---- data

async function inflate(name) {
  const bytes = Uint8Array.from(atob($(`data-${name}`).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

async function detailsOf(number) {
  const chunk = Math.floor(number / CHUNK);
  if (!chunks.has(chunk)) chunks.set(chunk, inflate(`details-${chunk}`));
  await reading;
  return (await chunks.get(chunk))[number % CHUNK];
}

const tokensOf = (text) => (typeof text === "string" ? null : text[1].map((token) => tokens[token]));

function textOf(text) {
  if (typeof text === "string") return text;
  return typeof text[0] === "string" ? text[0] : tokensOf(text).join("").slice(0, text[0]);
}

const addressOf = ([task, id, , , , twin]) => `${tasks[task].name}/${id}${twin ? `~${twin}` : ""}`;
const nameOf = ([metric, filter]) => `${metric}, ${filter}`;

// Returns the index of the metric that decides right and wrong: the chosen metric where the task has it, else its main one.
function metricOf(task) {
  const found = tasks[task].metrics.findIndex((names) => nameOf(names) === view.score);
  return found < 0 ? tasks[task].main : found;
}

// Returns a score with 1 for right and 0 for wrong, even where lower values are better.
function turned(task, metric, score) {
  return tasks[task].metrics[metric]?.[2] && (score === 0 || score === 1) ? 1 - score : score;
}

function scoreOf(row, run) {
  const metric = metricOf(row[0]);
  return turned(row[0], metric, row[4][run]?.[0][metric] ?? null);
}

function extractedOf(row, run) {
  const { metrics, filters } = tasks[row[0]];
  return row[4][run]?.[1][filters.indexOf(metrics[metricOf(row[0])]?.[1])] ?? null;
}

// Returns whether a run's score differs from the first run's; for the first run, whether any run's score does.
function changed(row, run) {
  if (!run) return runs.some((_, other) => other > 0 && changed(row, other));
  const pair = [scoreOf(row, 0), scoreOf(row, run)];
  return !pair.includes(null) && pair[0] !== pair[1];
}

function has(flag, row, run) {
  if (!row[4][run]) return false;
  if (flag === "right") return scoreOf(row, run) === 1;
  if (flag === "wrong") return scoreOf(row, run) !== null && scoreOf(row, run) >= 0 && scoreOf(row, run) < 1;
  if (flag === "invalid") return tasks[row[0]].extracts && extractedOf(row, run) === null;
  return row[4][run][2] > 0; // cut
}

function flagged(flag, row) {
  if (flag === "changed") return changed(row, Number(view.run));
  return view.run === "" ? runs.some((_, run) => has(flag, row, run)) : has(flag, row, Number(view.run));
}

function haystackOf(row, number) {
  const answers = (texts?.[number] ?? []).flatMap((ofRun) => ofRun.map(textOf));
  const extracted = row[4].flatMap((outcome) => outcome?.[1] ?? []);
  return [row[1], row[2], row[3], ...extracted, ...answers].join("\n").toLowerCase();
}

// ---- elements: text of models and data sets enters as text only, never as HTML

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "role") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function verdictOf(score) {
  if (score === null) return ["none", "–", "no score"];
  if (score === 1) return ["right", "✓", "right"];
  if (score === 0) return ["wrong", "✗", "wrong"];
  const text = score.toLocaleString("en", { maximumFractionDigits: 2 });
  return ["part", text, `score ${text}`];
}

function mark(score) {
  const [kind, sign, words] = verdictOf(score);
  return element("span", { className: `mark ${kind}`, role: "img", "aria-label": words, title: words }, sign);
}

const cell = (className, ...children) => element("span", { role: "cell", className }, ...children);
const key = (run) => element("b", { className: "key" }, runs[run].key);
const tag = (text, title) => element("span", { className: "tag", title }, text);

// ---- the table: only rows in sight have elements

function filter() {
  const words = view.q.toLowerCase();
  const task = tasks.findIndex(({ name }) => name === view.task);
  const counts = Object.fromEntries(Object.keys(FLAGS).map((flag) => [flag, 0]));
  shown = [];
  documents.forEach((row, number) => {
    if (task >= 0 && row[0] !== task) return;
    if (words && !(haystacks[number] ?? haystackOf(row, number)).includes(words)) return;
    let all = true;
    for (const flag of Object.keys(FLAGS)) {
      const is = flagged(flag, row);
      counts[flag] += is;
      if (view.show.has(flag) && !is) all = false;
    }
    if (all) shown.push(number);
  });
  for (const button of $("flags").children) {
    button.setAttribute("aria-pressed", view.show.has(button.value));
    button.lastChild.textContent = counts[button.value].toLocaleString("en");
  }
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${documents.length.toLocaleString("en")} documents`;
  $("clear").hidden = !(view.q || view.task || view.run || view.show.size);
  $("empty").hidden = shown.length > 0;
  const none = "No run has samples. Evaluate with --log_samples.";
  $("empty").textContent = documents.length ? "No document matches." : none;
  $("table").setAttribute("aria-rowcount", shown.length + 1);
  if (!shown.includes(current)) current = shown[0] ?? -1;
  redraw();
}

function rowOf(number, position) {
  const row = documents[number];
  const [task, id, question, gold, outcomes] = row;
  const differs = flagged("changed", row);
  const href = `#doc=${encodeURIComponent(addressOf(row))}`;
  const link = element("a", { href, tabIndex: number === current ? 0 : -1 }, question.trim().slice(0, 300) || "–");
  const sign = { className: "tag", role: "img", "aria-label": "changed", title: MEANINGS.changed };
  const cells = outcomes.map((outcome, run) => outcome === null ? cell("run") : cell("run",
    element("span", { className: "narrow-key", "aria-hidden": "true" }, runs[run].key),
    mark(scoreOf(row, run)),
    element("span", { className: "extracted" }, extractedOf(row, run) ?? ""),
    has("invalid", row, run) ? tag("invalid", MEANINGS.invalid) : null,
    has("cut", row, run) ? tag("cut", MEANINGS.cut) : null));
  const classes = `row${number === current ? " current" : ""}${differs ? " changed" : ""}`;
  const made = element("div", { role: "row", className: classes, "aria-rowindex": position + 2 },
    cell("id", String(id)), cell("task", tasks[task].name),
    cell("question", differs ? element("span", sign, "≠") : null, " ", link), cell("gold", gold), ...cells);
  made.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    openDocument(number);
  });
  return made;
}

const rowHeight = () => parseFloat(getComputedStyle($("rows")).lineHeight);

function draw() {
  const height = rowHeight();
  const top = $("rows").getBoundingClientRect().top;
  const first = printing ? 0 : Math.max(0, Math.floor(-top / height) - 10);
  const last = printing ? shown.length : Math.min(shown.length, Math.ceil((innerHeight - top) / height) + 10);
  const wanted = new Map();
  for (let position = first; position < last; position += 1) wanted.set(shown[position], position);
  const place = shown.indexOf(current);
  if (place >= 0) wanted.set(current, place); // a row that has the focus stays
  for (const [number, row] of drawn) {
    if (wanted.has(number)) continue;
    row.remove();
    drawn.delete(number);
  }
  // Elements are in the order of the rows, since screen readers and the Tab key follow it.
  let next = $("rows").firstChild;
  for (const [number, position] of [...wanted].sort((a, b) => a[1] - b[1])) {
    if (drawn.has(number)) {
      next = drawn.get(number).nextSibling;
      continue;
    }
    const row = rowOf(number, position);
    row.style.top = `${position * height}px`;
    drawn.set(number, row);
    $("rows").insertBefore(row, next);
  }
  $("rows").style.height = `${shown.length * height}px`;
}

function redraw() {
  const focused = $("rows").contains(document.activeElement);
  drawn.clear();
  $("rows").replaceChildren();
  draw();
  if (focused) drawn.get(current)?.querySelector("a").focus({ preventScroll: true });
}

// Makes a document the current one, if it matches, and scrolls its row into sight.
function moveTo(number, focus = true) {
  const place = shown.indexOf(number);
  if (place < 0) return;
  const before = drawn.get(current);
  before?.classList.remove("current");
  before?.querySelector("a").setAttribute("tabindex", -1);
  current = number;
  const height = rowHeight();
  const top = $("rows").getBoundingClientRect().top + place * height;
  const above = $("bar").getBoundingClientRect().height + height;
  if (top < above) scrollBy(0, top - above);
  else if (top + height > innerHeight) scrollBy(0, top + 2 * height - innerHeight);
  draw();
  const row = drawn.get(number);
  row.classList.add("current");
  row.querySelector("a").setAttribute("tabindex", 0);
  if (focus) row.querySelector("a").focus({ preventScroll: true });
}
