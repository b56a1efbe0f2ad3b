// The opened document: what was asked, and the answers of the runs with their denoising.

const SHADES = [0.5, 0.7, 0.85, 0.95]; // confidences at which a token's shade changes
const LONGEST = 15_000; // milliseconds that playing an answer takes at most, unless steps would then be shorter than 30
let columns = []; // of the opened document, one for each run that has it
let opening = 0; // counts calls of openDocument
let timer = 0;

// Returns a block's element, its tokens (`places`) and `end`, the number of the answer's steps until the block is decided.
function blockOf(number, first, all, steps, record, [from, to]) {
  const places = all.map((token, place) => {
    const index = first + place;
    const confidence = record.confidences && record.confidences[index] / 10_000;
    const shade = confidence === null ? SHADES.length : SHADES.filter((border) => confidence >= border).length;
    const beyond = index < from || index >= to;
    const told = [`token ${index + 1}`, `block ${number + 1}`, `unmasked in step ${steps[index] + 1}`];
    if (confidence !== null) told.push(`confidence ${confidence.toFixed(4)}`);
    if (beyond) told.push(index < from ? "before the text that was scored: a thought" : "after the text that was scored");
    const span = element("span", { title: told.join(", "), onclick: () => goTo(steps[index] + 1) });
    // A token without a visible sign would show neither its place nor its confidence.
    const sign = token === "" ? "·" : token.replaceAll("\n", "↵\n");
    return { span, sign, step: steps[index], className: `token c${shade}${beyond ? " beyond" : ""}` };
  });
  const box = element("span", { className: "block" }, ...places.map(({ span }) => span));
  return { box, places, end: Math.max(...places.map(({ step }) => step)) + 1 };
}

// Returns the numbers of the first token that holds the text that was scored, and of the first token behind the text. All
// tokens hold it where it is not found in them. `thought` is null, or what stands before it.
function scoredTokens(all, text, thought) {
  if (thought && !thought[1]) return [all.length, all.length];
  const begin = all.join("").indexOf(text, thought ? thought[0].length : 0);
  if (begin < 0 || (!thought && begin > 0)) return [0, all.length];
  let length = 0;
  const ends = all.map((token) => (length += token.length));
  const from = begin === 0 ? 0 : ends.findIndex((end) => end > begin);
  const behind = ends.findIndex((end, place) => end - all[place].length >= begin + text.length);
  return [from < 0 ? all.length : from, behind < 0 ? all.length : behind];
}

// Puts an answer into a pane. Returns the number of its steps, and a function `show` that draws the answer after a number
// of steps and returns its progress in words.
function playerOf(record, text, all, thought, pane) {
  if (!record?.steps) {
    pane.textContent = text;
    return { steps: 0, show: () => "" };
  }
  let sum = 0, begin = 0;
  const steps = record.steps.map((difference) => (sum += difference));
  const scored = scoredTokens(all, text, thought);
  const blocks = record.blocks.map((first, number) => {
    const block = blockOf(number, first, all.slice(first, record.blocks[number + 1]), steps, record, scored);
    block.begin = begin;
    begin = block.end;
    return block;
  });
  const total = begin;
  pane.replaceChildren(...blocks.map(({ box }) => box));
  function show(step) {
    let at = 0;
    blocks.forEach((block, number) => {
      block.box.hidden = step < block.begin || (step === block.begin && step === total);
      if (block.box.hidden) return;
      at = number + 1;
      for (const { span, sign, step: its, className } of block.places) {
        const kept = its < step;
        span.className = kept ? className + (its === step - 1 ? " new" : "") : "token mask";
        const wanted = kept ? sign : "▢";
        if (span.textContent !== wanted) span.textContent = wanted;
      }
    });
    const kept = steps.filter((its) => its < step).length;
    const facts = [`step ${Math.min(step, total)} of ${total}`, `block ${at} of ${blocks.length}`];
    return [...facts, `${kept} of ${all.length} tokens`].join(" · ");
  }
  show(total);
  return { steps: total, show };
}

function factsOf(task, record, text, all, thought) {
  if (!tasks[task].extracts) return "log-likelihood of each continuation; ▸ marks the largest";
  if (!record) return `${text.length.toLocaleString("en")} characters · no denoising record`;
  const { denoising = 0, commit = 0, prefill = 0 } = record.forwards;
  const facts = [`${all.length} tokens`, `${denoising} denoising, ${commit} commit, ${prefill} prefill forwards`];
  if (denoising + commit) facts.push(`${((all.length - (record.forced ?? 0)) / (denoising + commit)).toFixed(2)} tokens per forward`);
  const end = record.finish === "length" ? "cut at the limit of new tokens" : `ended by ${record.finish}`;
  const thinking = thought && !thought[1] ? ["ended while thinking, so the scored text is empty"] : [];
  return [...facts, `${record.seconds.toFixed(2)} s`, end, ...thinking].join(" · ");
}

const folded = (name, text) =>
  element("details", {}, element("summary", {}, name), element("pre", { tabIndex: 0 }, text));

// Returns a table row for each filter: what the filter extracted, and the scores of its metrics.
function filterRows(task, scores, extracted, text) {
  const { metrics, filters, extracts } = tasks[task];
  return filters.map((name, place) => {
    const value = extracted[place] ?? (extracts ? tag("nothing extracted", MEANINGS.invalid) : "");
    const marks = metrics.flatMap(([metric, its], at) =>
      its === name ? [` ${metric} `, mark(turned(task, at, scores[at]))] : []);
    return element("tr", {}, element("th", { scope: "row" }, name),
      element("td", {}, value && value === text ? "the whole answer" : value), element("td", {}, ...marks));
  });
}

// Returns the column of a run. `move` goes to another of the run's answers; `player` belongs to the current answer.
function columnOf(number, run, answers) {
  const row = documents[number];
  const letter = runs[run].key;
  const found = element("tbody");
  const [facts, progress] = [1, 2].map(() => element("p", { className: "facts" }));
  const pane = element("div", { className: "answer", role: "group", "aria-label": `Answer of run ${letter}` });
  const thoughts = element("div");
  const which = element("span");
  const column = { player: null, progress };
  let answer = 0;
  column.move = (by) => {
    answer = (answer + by + answers.length) % answers.length;
    const [scores, extracted, record, thought = null] = answers[answer];
    const text = textOf(texts[number][run][answer]);
    const all = tokensOf(texts[number][run][answer]);
    which.textContent = `answer ${answer + 1} of ${answers.length}`;
    found.replaceChildren(...filterRows(row[0], scores, extracted, text));
    facts.textContent = factsOf(row[0], record, text, all, thought);
    const told = thought && `Thought, ${thought[0].length.toLocaleString("en")} characters${thought[1] ? "" : ", without an end"}`;
    thoughts.replaceChildren(...(thought ? [folded(told, thought[0])] : []));
    pane.style.minHeight = "";
    column.player = playerOf(record, text, all, thought, pane);
    pane.style.minHeight = `${pane.offsetHeight}px`; // keeps what is below in place while the answer grows
  };
  const turn = (by, sign, name) => element("button", {
    type: "button", "aria-label": `${name} answer of run ${letter}`, onclick: () => { column.move(by); lay(); },
  }, sign);
  const turns = element("p", { className: "turn" }, turn(-1, "‹", "Previous"), which, turn(1, "›", "Next"));
  const name = element("span", { className: "name" }, runs[run].name);
  const head = element("h3", {}, key(run), mark(scoreOf(row, run)), name);
  column.box = element("section", { className: "column", "aria-label": `Run ${letter}` }, head,
    answers.length > 1 ? turns : null, element("table", { className: "found" }, found), thoughts, pane, progress, facts);
  return column;
}

async function openDocument(number, step = null) {
  const ticket = ++opening;
  const [prompt, doc, ofRuns] = await detailsOf(number);
  if (ticket !== opening) return; // another document was opened meanwhile
  stop();
  const row = documents[number];
  const place = shown.indexOf(number);
  if (place >= 0) current = number;
  Object.assign(view, { doc: addressOf(row), step });
  $("document-title").textContent = `${tasks[row[0]].name}, document ${row[1]}`;
  $("place").textContent = place < 0 ? "not among those that match" : `${place + 1} of ${shown.length}`;
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place === shown.length - 1;
  const gold = element("p", {}, element("span", { className: "name" }, "Gold "), element("code", {}, row[3]));
  $("asked").replaceChildren(element("p", { className: "question" }, row[2]), gold);
  const parts = [["Prompt as sent", prompt], ["Document", doc]].filter(([, text]) => text !== "");
  $("asked").append(...parts.map(([name, text]) => folded(name, text)));
  columns = ofRuns.flatMap((answers, run) => (answers.length ? [columnOf(number, run, answers)] : []));
  $("answers").replaceChildren(...columns.map(({ box }) => box));
  if (!$("document").open) $("document").showModal();
  $("document").scrollTop = 0;
  for (const column of columns) column.move(0);
  lay();
  const verdicts = row[4].map((outcome, run) => outcome && `${runs[run].key} ${verdictOf(scoreOf(row, run))[2]}`);
  $("verdict").textContent = `Document ${row[1]}: ${verdicts.filter(Boolean).join(", ")}.`;
  write();
}

// Shows all answers at the page's step, or at their ends where no step is chosen.
function lay() {
  const steps = Math.max(0, ...columns.map(({ player }) => player.steps));
  $("player").hidden = steps === 0;
  $("step").max = steps;
  show(view.step ?? steps);
}

function show(step) {
  const steps = Number($("step").max);
  const at = Math.max(0, Math.min(steps, step));
  $("step").value = at;
  $("step").setAttribute("aria-valuetext", `step ${at} of ${steps}`);
  $("told").textContent = `step ${at} of ${steps}`;
  for (const { player, progress } of columns) progress.textContent = player.show(at);
  return at;
}

function goTo(step) {
  const at = show(step);
  view.step = at === Number($("step").max) ? null : at;
  if (!timer) write();
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
  if (steps === 0) return;
  if (Number($("step").value) === steps) goTo(0);
  $("play").textContent = "Pause";
  $("told").setAttribute("aria-live", "off"); // steps come faster than they can be read out
  timer = setInterval(() => {
    goTo(Number($("step").value) + 1);
    if (Number($("step").value) === steps) play();
  }, Math.max(30, Math.min(250, LONGEST / steps)));
}
