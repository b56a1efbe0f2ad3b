"use strict";
// documents.py describes the data: index, texts, tokens and details.

const $ = (id) => document.getElementById(id);
const CHUNK = Number($("data-details-0")?.dataset.chunk ?? 1);
const FLAGS = { right: "Right", wrong: "Wrong", changed: "Changed", invalid: "Invalid", cut: "Cut" };
const MEANINGS = {
  right: "The score is 1", wrong: "The score is 0", changed: "The score is not the first run's",
  invalid: "The filter extracted nothing", cut: "The answer ended at the limit of new tokens",
};

let runs = [], tasks = [], documents = [];
let texts = null; // document -> run -> answers, once inflated
let tokens = []; // the texts of tokens, once inflated
let reading = null; // the promise of both
let haystacks = []; // what the search looks into, in lower case
let shown = []; // numbers of the documents that match, in their order
let current = -1; // number of the document that the keyboard is at
let players = []; // of the opened document, one for each run
let timer = 0;
const chunks = new Map();
const drawn = new Map(); // number -> row element
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

const nameOf = ([metric, filter]) => (filter ? `${metric}, ${filter}` : metric);
const tokensOf = (text) => (typeof text === "string" ? null : text[1].map((token) => tokens[token]));

function textOf(text) {
  if (typeof text === "string") return text;
  return typeof text[0] === "string" ? text[0] : tokensOf(text).join("").slice(0, text[0]);
}

const addressOf = ([task, number, , , , twin]) => `${tasks[task].name}/${number}${twin ? `~${twin}` : ""}`;

// Which of the task's metrics decides right and wrong: the chosen one where the task has it.
function metricOf(task) {
  const found = tasks[task].metrics.findIndex((names) => nameOf(names) === view.score);
  return found < 0 ? tasks[task].main : found;
}

// A score with 1 for right and 0 for wrong, also where lower values are better.
function turned(task, metric, score) {
  return tasks[task].metrics[metric]?.[2] && (score === 0 || score === 1) ? 1 - score : score;
}

const scoreOf = (row, run) => turned(row[0], metricOf(row[0]), row[4][run]?.[0][metricOf(row[0])] ?? null);

function extractedOf(row, run) {
  const { metrics, filters } = tasks[row[0]];
  return row[4][run]?.[1][filters.indexOf(metrics[metricOf(row[0])]?.[1])] ?? null;
}

function changed(row, run) {
  const differs = (other) => {
    const pair = [scoreOf(row, 0), scoreOf(row, other)];
    return !pair.includes(null) && pair[0] !== pair[1];
  };
  return run ? differs(run) : runs.some((_, other) => other > 0 && differs(other));
}

function has(flag, row, run) {
  if (!row[4][run]) return false;
  if (flag === "right") return scoreOf(row, run) === 1;
  if (flag === "wrong") return scoreOf(row, run) === 0;
  if (flag === "invalid") return tasks[row[0]].extracts && extractedOf(row, run) === null;
  return row[4][run][2] > 0; // cut
}

function flagged(flag, row) {
  if (flag === "changed") return changed(row, Number(view.run) || 0);
  return view.run === "" ? runs.some((_, run) => has(flag, row, run)) : has(flag, row, Number(view.run));
}

// ---- elements: what comes from models and data sets enters as text only

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "role") made[name] = value;
    else if (value !== null) made.setAttribute(name, value);
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

const key = (run) => element("b", { className: "key" }, runs[run].key);
const tag = (text, title) => element("span", { className: "tag", title }, text);

// ---- the table of documents: only rows in sight are in the page

function haystackOf(row, number) {
  const answers = (texts?.[number] ?? []).flatMap((answers) => answers.map(textOf));
  const extracted = row[4].flatMap((outcome) => outcome?.[1] ?? []);
  return [row[1], row[2], row[3], ...extracted, ...answers].join("\n").toLowerCase();
}

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
  const total = documents.length.toLocaleString("en");
  $("count").textContent = `${shown.length.toLocaleString("en")} of ${total} documents`;
  $("clear").hidden = !(view.q || view.task || view.run || view.show.size);
  $("empty").hidden = shown.length > 0;
  $("empty").textContent = documents.length ? "No document matches." : "No run has samples. Evaluate with --log_samples.";
  $("table").setAttribute("aria-rowcount", shown.length + 1);
  if (!shown.includes(current)) current = shown[0] ?? -1;
  for (const row of drawn.values()) row.remove();
  drawn.clear();
  draw();
}

function rowOf(number, position) {
  const row = documents[number];
  const [task, id, question, gold, outcomes] = row;
  const cells = outcomes.map((outcome, run) => {
    const cell = element("span", { role: "cell", className: "run" });
    if (!outcome) return cell;
    const extracted = extractedOf(row, run);
    cell.append(element("span", { className: "narrow-key", "aria-hidden": "true" }, runs[run].key), mark(scoreOf(row, run)));
    cell.append(element("span", { className: "extracted" }, tasks[task].extracts ? extracted ?? "" : ""));
    if (has("invalid", row, run)) cell.append(tag("invalid", MEANINGS.invalid));
    if (has("cut", row, run)) cell.append(tag("cut", MEANINGS.cut));
    return cell;
  });
  const link = element("a", { href: `#doc=${encodeURIComponent(addressOf(row))}`, tabIndex: number === current ? 0 : -1 }, question.trim().slice(0, 300) || "(no question)");
  const differs = flagged("changed", row) ? element("span", { className: "tag", role: "img", "aria-label": "changed", title: MEANINGS.changed }, "≠") : "";
  const made = element("div", { role: "row", className: "row", "aria-rowindex": position + 2 },
    element("span", { role: "cell", className: "id" }, String(id)),
    element("span", { role: "cell", className: "task" }, tasks[task].name),
    element("span", { role: "cell", className: "question" }, differs, differs ? " " : "", link),
    element("span", { role: "cell", className: "gold" }, gold), ...cells);
  made.classList.toggle("current", number === current);
  made.classList.toggle("changed", differs !== "");
  made.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    open(number);
  });
  return made;
}

function rowHeight() {
  return parseFloat(getComputedStyle($("rows")).getPropertyValue("line-height"));
}

function draw(all = false) {
  const height = rowHeight();
  const top = $("rows").getBoundingClientRect().top;
  const first = all ? 0 : Math.max(0, Math.floor(-top / height) - 10);
  const last = all ? shown.length : Math.min(shown.length, Math.ceil((innerHeight - top) / height) + 10);
  const wanted = new Map();
  for (let position = first; position < last; position += 1) wanted.set(shown[position], position);
  if (current >= 0) wanted.set(current, shown.indexOf(current)); // keeps the focus
  for (const [number, row] of drawn) {
    if (wanted.has(number)) continue;
    row.remove();
    drawn.delete(number);
  }
  // Rows stand in their order, as screen readers and the Tab key follow it.
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

function moveTo(number, focus = true) {
  drawn.get(current)?.classList.remove("current");
  drawn.get(current)?.querySelector("a").setAttribute("tabindex", -1);
  current = number;
  const height = rowHeight();
  const top = $("rows").getBoundingClientRect().top + shown.indexOf(number) * height;
  const above = $("rows").parentElement.previousElementSibling.getBoundingClientRect().height + 2 * height;
  if (top < above) scrollBy(0, top - above);
  else if (top + height > innerHeight) scrollBy(0, top + 2 * height - innerHeight);
  draw();
  drawn.get(number)?.classList.add("current");
  const link = drawn.get(number)?.querySelector("a");
  link?.setAttribute("tabindex", 0);
  if (focus) link?.focus({ preventScroll: true });
}

// ---- an answer and its denoising

// Returns an object with `steps`, the number of denoising steps, and show(step), which draws the answer after so many.
function player(record, text, all, pane) {
  if (!record?.steps) {
    pane.textContent = text;
    return { steps: 0, show: () => "" };
  }
  let sum = 0;
  const steps = record.steps.map((difference) => (sum += difference));
  let length = 0, begin = 0;
  const scored = all.join("").startsWith(text) ? text.length : Infinity;
  const blocks = record.blocks.map((first, number) => {
    const end = record.blocks[number + 1] ?? steps.length;
    const box = element("span", { className: "block" });
    const spans = all.slice(first, end).map((token, place) => {
      const index = first + place;
      const sure = record.confidences ? record.confidences[index] / 10000 : null;
      const span = element("span", { className: "token" });
      span.title = `token ${index + 1}, block ${number + 1}, kept in step ${steps[index] + 1}` + (sure === null ? "" : `, confidence ${sure.toFixed(4)}`);
      const shade = sure === null ? "c4" : `c${[0.5, 0.7, 0.85, 0.95].filter((border) => sure >= border).length}`;
      const beyond = length >= scored ? " beyond" : "";
      length += token.length;
      // A token without a visible sign would show neither its place nor its confidence.
      const sign = token === "" ? "·" : token.replaceAll("\n", "↵\n");
      span.addEventListener("click", () => goTo(steps[index] + 1));
      return { span, step: steps[index], sign, kept: `token ${shade}${beyond}` };
    });
    box.append(...spans.map(({ span }) => span));
    const block = { box, spans, begin };
    begin = Math.max(...spans.map(({ step }) => step)) + 1;
    return block;
  });
  pane.replaceChildren(...blocks.map(({ box }) => box));
  function show(step) {
    let kept = 0, fresh = 0, at = 0;
    blocks.forEach(({ box, spans, begin: since }, number) => {
      const begun = since < step || (since === step && step < begin);
      box.hidden = !begun;
      if (!begun) return;
      at = number + 1;
      for (const { span, step: its, sign, kept: style } of spans) {
        const is = its < step;
        kept += is;
        fresh += its === step - 1;
        span.className = is ? style + (its === step - 1 ? " new" : "") : "token mask";
        const wanted = is ? sign : "▢";
        if (span.textContent !== wanted) span.textContent = wanted;
      }
    });
    const done = step >= begin;
    return `${Math.min(step, begin)} of ${begin} steps · block ${at} of ${blocks.length} · ${kept} of ${steps.length} tokens` + (done ? "" : ` · ${fresh} new`);
  }
  show(begin);
  return { steps: begin, show };
}

function factsOf(record, text, all) {
  if (!record) return `${text.length.toLocaleString("en")} characters · no record of the denoising`;
  const { denoising = 0, commit = 0, prefill = 0 } = record.forwards;
  const count = all.length;
  const facts = [`${count} tokens`, `${denoising} denoising, ${commit} commit, ${prefill} prefill forwards`];
  if (denoising + commit) facts.push(`${(count / (denoising + commit)).toFixed(2)} tokens per forward`);
  facts.push(`${record.seconds.toFixed(2)} s`, record.finish === "length" ? "cut at the limit" : `ended by ${record.finish}`);
  return facts.join(" · ");
}

// The column of a run: its verdict, what its filters extracted, and the answer that `move` steps through.
function columnOf(number, run, answers) {
  const row = documents[number];
  const { metrics, filters, extracts } = tasks[row[0]];
  const found = element("table", { className: "found" });
  const facts = element("p", { className: "facts" });
  const progress = element("p", { className: "facts progress" });
  const pane = element("div", { className: "answer", role: "group", "aria-label": `Answer of run ${runs[run].key}` });
  const which = element("span", { className: "which" });
  const head = element("h3", {}, key(run), mark(scoreOf(row, run)), element("span", { className: "name" }, runs[run].name));
  const column = element("section", { "aria-label": `Run ${runs[run].key}`, className: "column" }, head);
  const shownNow = { steps: 0, show: () => "" };
  let answer = 0;
  function move(by) {
    answer = (answer + by + answers.length) % answers.length;
    const [scores, extracted, record] = answers[answer];
    const text = textOf(texts[number][run][answer]);
    const all = tokensOf(texts[number][run][answer]);
    which.textContent = `answer ${answer + 1} of ${answers.length}`;
    found.replaceChildren(...filters.map((name, place) => {
      const value = extracted[place] ?? (extracts ? tag("nothing extracted", MEANINGS.invalid) : "");
      const marks = metrics.flatMap(([metric, its], at) => (its === name ? [`${metric} `, mark(turned(row[0], at, scores[at])), " "] : []));
      return element("tr", {}, element("th", { scope: "row" }, name),
        element("td", {}, value && value === text ? "the whole answer" : value), element("td", {}, ...marks));
    }));
    facts.textContent = factsOf(record, text, all);
    pane.style.minHeight = "";
    Object.assign(shownNow, player(record, text, all, pane));
    pane.style.minHeight = `${pane.offsetHeight}px`;
    shownNow.draw = (step) => { progress.textContent = shownNow.show(step); };
  }
  if (answers.length > 1) {
    const turn = (by, sign, name) => element("button", { type: "button", "aria-label": `${name} answer of run ${runs[run].key}`, onclick: () => { move(by); lay(); } }, sign);
    column.append(element("p", { className: "turn" }, turn(-1, "‹", "Previous"), which, turn(1, "›", "Next")));
  }
  column.append(found, pane, progress, facts);
  return { column, now: shownNow, move, start: () => move(0) };
}

// ---- the opened document

async function open(number, step = null) {
  const details = await detailsOf(number);
  stop();
  const row = documents[number];
  const [prompt, doc, ofRuns] = details;
  current = number;
  view.doc = addressOf(row);
  view.step = step;
  $("document-title").textContent = `${tasks[row[0]].name}, document ${row[1]}`;
  const position = shown.indexOf(number);
  $("place").textContent = position < 0 ? "not among those that match" : `${position + 1} of ${shown.length}`;
  $("previous").disabled = position <= 0;
  $("next").disabled = position < 0 || position === shown.length - 1;
  const folded = (name, text) => text ? element("details", {}, element("summary", {}, name), element("pre", { tabIndex: 0 }, text)) : null;
  $("asked").replaceChildren(element("p", { className: "question" }, row[2]),
    element("p", { className: "gold" }, element("span", { className: "name" }, "Gold "), element("code", {}, row[3])),
    ...[folded("Prompt as sent", prompt), folded("Document", doc)].filter(Boolean));
  players = ofRuns.flatMap((answers, run) => (answers.length ? [columnOf(number, run, answers)] : []));
  $("answers").replaceChildren(...players.map(({ column }) => column));
  if (!$("document").open) $("document").showModal();
  $("document").scrollTop = 0;
  for (const each of players) each.start();
  lay();
  $("verdict").textContent = `Document ${row[1]}: ${row[4].map((outcome, run) => outcome ? `${runs[run].key} ${verdictOf(scoreOf(row, run))[2]}` : "").filter(Boolean).join(", ")}.`;
  write();
}

// Draws all answers at the step that the page is at, or at their ends.
function lay() {
  const steps = Math.max(0, ...players.map(({ now }) => now.steps));
  $("player").hidden = steps === 0;
  $("step").max = steps;
  goTo(view.step ?? steps, false);
}

function goTo(step, told = true) {
  const steps = Number($("step").max);
  const at = Math.max(0, Math.min(steps, step));
  $("step").value = at;
  $("step").setAttribute("aria-valuetext", `step ${at} of ${steps}`);
  $("told").textContent = `step ${at} of ${steps}`;
  for (const { now } of players) now.draw?.(at);
  if (told) {
    view.step = at === steps ? null : at;
    if (!timer) write();
  }
}

function stop() {
  clearInterval(timer);
  timer = 0;
  $("play").textContent = "Play";
  $("told").setAttribute("aria-live", "polite");
}

function play() {
  if (timer) {
    stop();
    write();
    return;
  }
  const steps = Number($("step").max);
  if (Number($("step").value) === steps) goTo(0);
  $("play").textContent = "Pause";
  $("told").setAttribute("aria-live", "off"); // a screen reader could not follow
  timer = setInterval(() => {
    goTo(Number($("step").value) + 1);
    if (Number($("step").value) === steps) play();
  }, Math.max(30, Math.min(250, 15000 / steps)));
}

function turn(by) {
  const number = shown[shown.indexOf(current) + by];
  if (number === undefined) return;
  if ($("document").open) open(number);
  moveTo(number, !$("document").open);
}

// ---- the address keeps what is shown

function write() {
  const parts = new URLSearchParams();
  for (const name of ["q", "task", "score", "run", "doc"]) if (view[name]) parts.set(name, view[name]);
  if (view.show.size) parts.set("show", [...view.show].join(","));
  if (view.doc && view.step !== null) parts.set("step", view.step);
  history.replaceState(null, "", `#${parts}`);
}

async function read() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return; // a section
  const parts = new URLSearchParams(hash);
  for (const name of ["q", "task", "score", "run", "doc"]) view[name] = parts.get(name) ?? "";
  view.show = new Set((parts.get("show") ?? "").split(",").filter((flag) => flag in FLAGS));
  if (!(view.run in runs)) view.run = "";
  for (const name of ["task", "score", "run"]) $(name).value = view[name];
  $("search").value = view.q;
  const step = parts.has("step") ? Number(parts.get("step")) : null;
  const wanted = view.doc;
  filter();
  const number = documents.findIndex((row) => addressOf(row) === wanted);
  if (number >= 0) await open(number, Number.isFinite(step) ? step : null);
  else if ($("document").open) $("document").close();
}

function changedView(name, value) {
  view[name] = value;
  filter();
  write();
}

// ---- controls

function fill() {
  const options = (select, names) => select.replaceChildren(...names.map(([value, text]) => element("option", { value }, text)));
  const metrics = new Set(tasks.flatMap(({ metrics }) => metrics.map(nameOf)));
  options($("task"), [["", "all"], ...tasks.map(({ name }) => [name, name])]);
  options($("score"), [["", tasks.length === 1 ? nameOf(tasks[0].metrics[tasks[0].main] ?? ["–"]) : "each task's first metric"], ...[...metrics].map((names) => [names, names])]);
  options($("run"), [["", "any run"], ...runs.map(({ key: letter }, run) => [run, `run ${letter}`])]);
  $("task-label").hidden = tasks.length < 2;
  $("score-label").hidden = metrics.size < 2;
  $("run-label").hidden = runs.length < 2;
  $("flags").replaceChildren(...Object.entries(FLAGS).filter(([flag]) => flag !== "changed" || runs.length > 1).map(([flag, name]) =>
    element("button", { type: "button", value: flag, title: MEANINGS[flag], "aria-pressed": "false" }, `${name} `, element("span", { className: "count" }))));
  const columns = ["#", "Task", "Question", "Gold"].map((name) => element("span", { role: "columnheader", className: name === "#" ? "id" : name.toLowerCase() }, name));
  $("head").replaceChildren(...columns, ...runs.map((_, run) => element("span", { role: "columnheader", className: "run" }, key(run))));
  $("table").classList.toggle("one-task", tasks.length < 2);
  $("table").classList.toggle("many", runs.length > 4);
  $("table").style.setProperty("--n", runs.length);
  for (const name of ["task", "score", "run"]) $(name).addEventListener("change", ({ target }) => changedView(name, target.value));
  $("search").addEventListener("input", ({ target }) => changedView("q", target.value.trim()));
  $("flags").addEventListener("click", ({ target }) => {
    const flag = target.closest("button")?.value;
    if (!flag) return;
    if (!view.show.delete(flag)) view.show.add(flag);
    changedView("show", view.show);
  });
  $("clear").addEventListener("click", () => { Object.assign(view, { q: "", task: "", run: "", show: new Set() }); write(); read(); $("search").focus(); });
  $("play").addEventListener("click", play);
  $("step").addEventListener("input", ({ target }) => { stop(); goTo(Number(target.value)); });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("document").close());
  $("document").addEventListener("close", () => { stop(); view.doc = ""; view.step = null; write(); moveTo(current); });
}

document.addEventListener("keydown", (event) => {
  const { key: pressed, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("select, pre")) return;
  const opened = $("document").open;
  const typing = target === $("search");
  const arrows = opened || typing || $("rows").contains(target);
  const by = { j: !typing && 1, k: !typing && -1, ArrowDown: arrows && 1, ArrowUp: arrows && -1 }[pressed];
  const side = opened && { ArrowRight: 1, ArrowLeft: -1 }[pressed];
  const answer = opened && { "]": 1, "[": -1 }[pressed];
  if (by) {
    if (opened || $("rows").contains(document.activeElement)) turn(by);
    else if (current >= 0) moveTo(current);
  } else if (side) {
    stop();
    goTo(Number($("step").value) + side);
  } else if (answer) {
    for (const each of players) each.move(answer);
    lay();
  } else if (pressed === "p" && opened) play();
  else if (pressed === "/" && !typing && !opened) $("search").focus();
  else if (pressed === "Escape" && typing) target.blur();
  else return;
  event.preventDefault();
});
addEventListener("scroll", () => requestAnimationFrame(() => draw()), { passive: true });
addEventListener("resize", filter);
addEventListener("hashchange", read);
addEventListener("beforeprint", () => draw(true));
addEventListener("afterprint", () => draw());

(async () => {
  [{ tasks, documents }, runs] = await Promise.all([inflate("index"), inflate("runs")]);
  fill();
  reading = Promise.all([inflate("texts"), inflate("tokens")]).then((found) => { [texts, tokens] = found; });
  await read();
  await reading;
  for (const [number, row] of documents.entries()) {
    haystacks[number] = haystackOf(row, number);
    if (number % 64 === 0) await new Promise((resolve) => setTimeout(resolve)); // the page stays responsive
  }
  if (view.q) filter(); // answers count too
})();
