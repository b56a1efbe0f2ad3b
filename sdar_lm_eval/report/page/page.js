// The address, which holds the state of the view; the controls; the start.

const KEPT = ["q", "task", "score", "run", "doc"];

function write() {
  const parts = new URLSearchParams();
  for (const name of KEPT) if (view[name]) parts.set(name, view[name]);
  if (view.show.size) parts.set("show", [...view.show].join(","));
  if (view.doc && view.step !== null) parts.set("step", view.step);
  history.replaceState(null, "", `#${parts}`);
}

async function read() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return; // the address of a section
  const parts = new URLSearchParams(hash);
  for (const name of KEPT) view[name] = parts.get(name) ?? "";
  view.show = new Set((parts.get("show") ?? "").split(",").filter((flag) => Object.hasOwn(FLAGS, flag)));
  if (!runs.some((_, run) => view.run === String(run))) view.run = "";
  for (const name of ["task", "score", "run"]) $(name).value = view[name];
  $("search").value = view.q;
  const wanted = view.doc;
  const step = /^\d+$/.test(parts.get("step")) ? Number(parts.get("step")) : null;
  filter();
  const number = documents.findIndex((row) => addressOf(row) === wanted);
  if (number >= 0) await openDocument(number, step);
  else if ($("document").open) $("document").close();
}

function choose(name, value) {
  view[name] = value;
  filter();
  write();
}

// Goes to the next matching document (1), or to the previous one (-1).
function turn(by) {
  const number = shown[shown.indexOf(current) + by];
  if (number === undefined) return;
  const opened = $("document").open;
  moveTo(number, !opened);
  if (opened) openDocument(number);
}

function pressed(event) {
  const { key: name, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.matches("select, pre")) return;
  const opened = $("document").open;
  const typing = target === $("search");
  const listed = $("rows").contains(target);
  const by = { j: !typing && 1, k: !typing && -1, ArrowDown: 1, ArrowUp: -1 }[name];
  const steps = { ArrowRight: 1, ArrowLeft: -1 }[name];
  const answers = { "]": 1, "[": -1 }[name];
  if (by && (opened || listed)) turn(by);
  else if (by && (typing || name === "j" || name === "k")) moveTo(current);
  else if (opened && steps) {
    stop();
    goTo(Number($("step").value) + steps);
  } else if (opened && answers) {
    for (const column of columns) column.move(answers);
    lay();
  } else if (opened && name === "p") play();
  else if (!opened && !typing && name === "/") $("search").focus();
  else if (typing && name === "Escape") target.blur();
  else return;
  event.preventDefault();
}

function fill() {
  const options = (name, values) => $(name).replaceChildren(
    ...values.map(([value, text]) => element("option", { value }, text)));
  const header = (className, ...children) => element("span", { role: "columnheader", className }, ...children);
  const metrics = new Set(tasks.flatMap((task) => task.metrics.map(nameOf)));
  const main = tasks.length === 1 && metrics.size ? nameOf(tasks[0].metrics[tasks[0].main]) : "each task's main metric";
  options("task", [["", "all"], ...tasks.map(({ name }) => [name, name])]);
  options("score", [["", main], ...[...metrics].filter((name) => name !== main).map((name) => [name, name])]);
  options("run", [["", "any run"], ...runs.map((run, number) => [number, `run ${run.key}`])]);
  $("task-label").hidden = tasks.length < 2;
  $("score-label").hidden = metrics.size < 2;
  $("run-label").hidden = runs.length < 2;
  const flags = Object.entries(FLAGS).filter(([flag]) => flag !== "changed" || runs.length > 1);
  $("flags").replaceChildren(...flags.map(([value, name]) =>
    element("button", { type: "button", value, title: MEANINGS[value], "aria-pressed": "false" }, `${name} `,
      element("span", { className: "count" }))));
  $("head").replaceChildren(header("id", "#"), header("task", "Task"), header("question", "Question"),
    header("gold", "Gold"), ...runs.map((_, run) => header("run", key(run))));
  $("table").classList.toggle("one-task", tasks.length < 2);
  $("table").classList.toggle("many", runs.length > 4);
  $("table").style.setProperty("--n", runs.length);
}

function listen() {
  for (const name of ["task", "score", "run"]) $(name).addEventListener("change", () => choose(name, $(name).value));
  $("search").addEventListener("input", () => choose("q", $("search").value.trim()));
  $("flags").addEventListener("click", ({ target }) => {
    const flag = target.closest("button")?.value;
    if (!flag) return;
    if (!view.show.delete(flag)) view.show.add(flag);
    choose("show", view.show);
  });
  $("clear").addEventListener("click", () => {
    Object.assign(view, { q: "", task: "", run: "", show: new Set() });
    write();
    read();
    $("search").focus();
  });
  $("play").addEventListener("click", play);
  $("step").addEventListener("input", () => {
    stop();
    goTo(Number($("step").value));
  });
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => $("document").close());
  $("document").addEventListener("close", () => {
    stop();
    Object.assign(view, { doc: "", step: null });
    write();
    moveTo(current);
  });
  document.addEventListener("keydown", pressed);
  addEventListener("scroll", () => requestAnimationFrame(() => draw()), { passive: true });
  addEventListener("resize", redraw);
  addEventListener("hashchange", async () => {
    await read();
    if (view.show.size && !$("document").open) $("documents").scrollIntoView(); // a link of the comparison
  });
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
}

async function start() {
  [{ tasks, documents }, runs] = await Promise.all([inflate("index"), inflate("runs")]);
  fill();
  listen();
  reading = Promise.all([inflate("texts"), inflate("tokens")]).then((found) => { [texts, tokens] = found; });
  await read();
  await reading;
  for (const [number, row] of documents.entries()) {
    haystacks[number] = haystackOf(row, number);
    if (number % 64 === 0) await new Promise((resolve) => setTimeout(resolve)); // the page stays responsive
  }
  $("table").setAttribute("aria-busy", "false");
  if (view.q) filter(); // now the search finds answers too
}

start();
