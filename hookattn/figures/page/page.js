"use strict";
/* What is looked at, what changes it, and what the page says of it. */

const facts = JSON.parse(document.getElementById("facts-of-the-page").textContent);
const $ = (id) => document.getElementById(id);
const state = {
  photo: 0, layer: 0, head: "mean", query: facts.start, direction: "to", pointer: "ask", scale: "panel", opacity: 0.85,
  threshold: 1, colours: "inferno", theme: "", pin: null, link: true,
};
let photos, thumbs, scatter, hovered = null, waiting = 0, asked = 0, shownNow = null, figures = [], spoken = 0;

const photo = () => photos[state.photo];
const layer = () => photo().layers[state.layer];
const queryNow = () => (state.pointer === "ask" && hovered ? { point: hovered } : state.query);
const viewNow = () => ({ scale: state.scale, opacity: state.opacity, threshold: state.threshold, colours: state.colours });

function schedule() {
  if (!waiting) {
    asked = performance.now();
    waiting = requestAnimationFrame(() => { waiting = 0; update(); });
  }
}

/* Everything that follows from the state, drawn anew. */
function update() {
  const began = performance.now(), query = queryNow(), { direction } = state;
  const panels = photo().layers.map((each) => {
    const selected = each.select(query, direction, photo());
    if (!each.bytes || !selected.length) return new Map();
    const heads = each.heads > 1 ? ["mean", ...Array(each.heads).keys()] : [0];
    return new Map(heads.map((head) => [head, each.panel(head, selected, direction)]));
  });
  const chosen = panels[state.layer].get(state.head) ?? null, pinned = pinnedPanel(query);
  const all = panels.flatMap((row) => [...row.values()]);
  setScales(pinned ? [...all, pinned.panel] : all, state.scale);
  thumbs.draw(panels, viewNow(), { row: state.layer, head: state.head });
  const views = [{ panel: chosen, query, direction, layer: layer(), head: state.head }];
  if (pinned) views.unshift(pinned);
  drawStage(views);
  shownNow = views[views.length - 1];
  sayNumbers();
  window.hookattn.lastUpdateMs = performance.now() - began;
  window.hookattn.lastAnswerMs = performance.now() - asked;
  window.hookattn.updates++;
}

function pinnedPanel(query) {
  if (!state.pin) return null;
  const pin = state.link ? { ...state.pin, query, direction: state.direction } : state.pin, of = photo().layers[pin.layer];
  const selected = of.select(pin.query, pin.direction, photo());
  const panel = selected.length ? of.panel(pin.head, selected, pin.direction) : null;
  return panel && { panel, query: pin.query, direction: pin.direction, layer: of, head: pin.head, isPinned: true };
}

function marksOf({ layer: of, query, direction }) {
  const tokens = direction === "to" ? of.queries : of.keys;
  if (query.token) return [];
  const place = tokens.placeAt(photo().toInput(query.point));
  return place < 0 ? [] : [tokens.boxOf(place)];
}

function nameQuery(view) {
  const names = { cls: "class token", dist: "distillation token", mean: "mean of all patches", pool: "mean token" }, { query } = view;
  if (query.token) return names[query.token] ?? query.token.replace(/^reg(\d+)$/, "register $1");
  const tokens = view.direction === "to" ? view.layer.queries : view.layer.keys, place = tokens.placeAt(photo().toInput(query.point));
  if (place < 0) return "no patch";
  return `patch (${Math.floor(place / tokens.columns)}, ${place % tokens.columns})`;
}

/* --- the photo, with one panel over it or two --- */

function drawStage(views) {
  while (figures.length < views.length) figures.push(makeFigure());
  while (figures.length > views.length) figures.pop().root.remove();
  $("stage").classList.toggle("two", views.length > 1);
  views.forEach((view, i) => {
    const { root, canvas, title, below } = figures[i];
    root.classList.toggle("pinned", Boolean(view.isPinned));
    const width = canvas.clientWidth, height = canvas.clientHeight;
    figures[i].view = view;
    drawPanel(fit(canvas, width, height), width, height, photo(), view.panel, marksOf(view), viewNow());
    setText(title, `${shorten(view.layer.name)}, ${nameHead(view.layer, view.head)}`);
    setText(title.nextSibling, `${view.isPinned ? "pinned · " : ""}${nameQuery(view)} ${view.direction === "to" ? "looks at" : "is looked at by"}`);
    drawShares(below, view);
  });
}

function makeFigure() {
  const canvas = make("canvas", { ariaHidden: "true" }), frame = make("div", { className: "frame", tabIndex: 0 });
  frame.setAttribute("role", "application");
  frame.setAttribute("aria-label", "Photo: arrow keys move the query patch, space holds it");
  const { src, size, shape } = photo();
  frame.style.aspectRatio = String(shape);
  if (src) frame.append(make("img", { src, alt: photo().name || "photo", draggable: false }));
  frame.append(canvas);
  const title = make("b"), below = make("div", { className: "shares" });
  const root = make("figure", {}, make("figcaption", {}, title, make("span")), frame, below);
  root.style.setProperty("--shape", size ? size[1] / size[0] : shape);
  const pointOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
  };
  const inside = (point) => point.every((p) => p >= 0 && p < 1);
  frame.addEventListener("pointermove", (event) => {
    const point = pointOf(event);
    if (inside(point)) hover(point);
  });
  frame.addEventListener("pointerleave", () => hover(null));
  frame.addEventListener("click", (event) => {
    const point = pointOf(event);
    if (inside(point)) hold(point);
  });
  $("stage").append(root);
  return { root, frame, canvas, title, below };
}

function hover(point) {
  hovered = point;
  if (state.pointer === "ask" || !point) schedule();
  else sayNumbers();
}

/* A click: this patch is the query, and numbers follow the pointer. */
function hold(point) {
  const tokens = state.direction === "to" ? layer().queries : layer().keys;
  if (tokens.placeAt(photo().toInput(point)) < 0 && tokens.area) return;
  set({ query: { point }, pointer: "read" });
}

function drawShares(root, { panel, direction }) {
  const parts = [];
  if (panel && direction === "to" && panel.layer.perUnit) {
    const named = new Map();
    panel.tokens.prefix.forEach((name, i) => {
      const kind = /^reg\d+$/.test(name) ? "registers" : { cls: "class token", dist: "distillation token" }[name] ?? name;
      named.set(kind, (named.get(kind) ?? 0) + panel.named[i]);
    });
    parts.push(["patches", panel.onPatches], ...named);
    if (panel.padding > 1e-6) parts.push(["padding", panel.padding]);
  }
  const bar = make("div", { className: "share-bar" });
  parts.forEach(([, share], i) => {
    const part = bar.appendChild(make("i", { className: `part-${Math.min(i, 3)}` }));
    part.style.width = `${100 * share}%`;
  });
  const text = parts.map(([name, share], i) => make("span", { className: `part-${Math.min(i, 3)}` }, `${name} ${percent(share)}`));
  if (panel && direction === "from" && panel.named.length) {
    const from = panel.tokens.prefix.slice(0, 6).map((name, i) => `${nameQuery({ query: { token: name } })} ${digits(panel.named[i])}`);
    text.push(make("span", { className: "plain" }, `from ${from.join(", ")}`));
  }
  if (parts.length) text.push(make("span", { className: "plain" }, `entropy ${panel.entropy().toFixed(2)} nats`));
  else if (!panel) text.push(make("span", { className: "plain" }, "this layer has no such token"));
  root.replaceChildren(...(parts.length ? [bar] : []), ...text);
}

/* --- numbers --- */

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const digits = (value) => (Math.abs(value) >= 0.001 || value === 0 ? Number(value.toPrecision(3)).toString() : value.toExponential(2));

/* What lies under the pointer, or the highest patch while there is none. */
function read() {
  const { panel } = shownNow;
  if (!panel || !panel.cells.length) return null;
  let place = hovered ? panel.tokens.placeAt(photo().toInput(hovered)) : -1;
  const isPeak = place < 0;
  if (isPeak) place = panel.cells.indexOf(highest(panel.cells)[0]);
  if (place < 0) return null;
  const value = panel.cells[place], { columns } = panel.tokens;
  return {
    patch: [Math.floor(place / columns), place % columns], value, isPeak, doubt: panel.doubt(value),
    isOutside: Boolean(panel.reach && !panel.reach[place]), times: value / panel.uniform, rank: panel.rankOf(value),
  };
}

function sayNumbers() {
  const found = read(), { panel } = shownNow, rows = [];
  if (found) {
    const where = found.isPeak ? "highest patch" : "under the pointer";
    rows.push([where, `(${found.patch.join(", ")})`]);
    rows.push(["weight", found.isOutside ? "0, outside of its window" : `${digits(found.value)}`, found.isOutside ? "" : `± ${found.doubt.toExponential(0)}`]);
    if (found.times === found.times) rows.push(["times uniform", digits(found.times)]);
    rows.push(["rank", `${found.rank}`, `of ${panel.cells.length}`]);
  } else if (panel) {
    panel.tokens.prefix.forEach((name, i) => i < 8 && rows.push([name, digits(panel.named[i])]));
  }
  const list = $("numbers");
  while (list.children.length > rows.length) list.lastChild.remove();
  while (list.children.length < rows.length) list.append(make("div", {}, make("dt"), make("dd", {}, make("b"), make("small"))));
  rows.forEach(([name, value, rest], i) => {
    const [dt, dd] = list.children[i].children;
    setText(dt, name);
    setText(dd.firstChild, value);
    setText(dd.lastChild, rest ?? "");
  });
  clearTimeout(spoken);
  spoken = setTimeout(speak, 500, found);
}

function speak(found) {
  const view = shownNow, { panel } = view;
  const what = `${view.layer.name}, ${nameHead(view.layer, view.head)}, ${nameQuery(view)} ${view.direction === "to" ? "looks at" : "is looked at by"}`;
  const which = found && `${found.isPeak ? "highest patch" : "patch"} (${found.patch.join(", ")}): ${digits(found.value)}`;
  const much = panel && view.direction === "to" && view.layer.perUnit ? `, ${percent(panel.onPatches)} on patches` : "";
  setText($("live"), [what + much, which ?? "no numbers"].join("; "));
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/* --- state --- */

function set(changes) {
  const before = state.photo;
  Object.assign(state, changes);
  if (state.photo !== before) return showPhoto();
  showState();
  schedule();
}

function showState() {
  for (const id of ["scale", "colours"]) $(id).value = state[id];
  for (const [id, text] of [["opacity", (v) => `${v} %`], ["threshold", (v) => (v === 100 ? "off" : `${v} % of mass`)]]) {
    const value = Math.round(100 * state[id]);
    $(id).value = value;
    $(id).nextElementSibling.textContent = text(value);
  }
  for (const id of ["direction", "pointer"]) {
    for (const button of $(id).children) button.ariaPressed = String(button.dataset.value === state[id]);
  }
  for (const button of $("tokens").querySelectorAll("button")) button.ariaPressed = String(button.dataset.token === state.query.token);
  const list = $("tokens").querySelector("select");
  if (list) list.value = state.query.token ?? "";
  [...$("strip").children].forEach((button, i) => (button.ariaPressed = String(i === state.photo)));
  $("pin").ariaPressed = String(Boolean(state.pin));
  $("link").hidden = !state.pin;
  $("link").ariaPressed = String(state.link);
  document.documentElement.style.colorScheme = state.theme || "light dark";
  drawRamp();
  scatter.select(state.layer, state.head);
  writeFragment();
}

function drawRamp() {
  const context = $("ramp").getContext("2d"), image = context.createImageData(256, 1), table = TABLES[state.colours];
  for (let i = 0; i < 256; i++) image.data.set([...table.slice(3 * i, 3 * i + 3), 255], 4 * i);
  context.putImageData(image, 0, 0);
  setText($("ramp-ends"), {
    panel: "0 to the panel's highest patch, dimmer where less goes to patches", layer: "0 to the highest patch of the layer",
    all: "0 to the highest patch of all", log: "a hundredth of the highest patch of all to all of it, in powers of ten",
  }[state.scale]);
}

let written = "";
function writeFragment() {
  const parts = new URLSearchParams({
    photo: state.photo, layer: layer().name, head: state.head, direction: state.direction, pointer: state.pointer, scale: state.scale,
    opacity: state.opacity, threshold: state.threshold, colours: state.colours, theme: state.theme,
    query: textOf(state.query), link: state.link ? 1 : 0,
  });
  if (state.pin) parts.set("pin", JSON.stringify([state.pin.layer, state.pin.head, textOf(state.pin.query), state.pin.direction]));
  written = `#${parts}`;
  try {
    history.replaceState(null, "", written);
  } catch { /* a frame without an address has none to write into */ }
}

const textOf = (query) => query.token ?? query.point.map((p) => p.toFixed(4)).join(",");
const choiceOf = (value, choices, otherwise) => (choices.includes(value) ? value : otherwise);
const numberOf = (value, otherwise, low = 0, high = 1) => (value !== null && Number(value) >= low && Number(value) <= high ? Number(value) : otherwise);

function queryOf(text, otherwise) {
  if (text === null) return otherwise;
  const point = text.split(",").map(Number);
  if (point.length === 2 && point.every((p) => p >= 0 && p <= 1)) return { point };
  const names = photo().layers.flatMap((each) => [...each.queries.prefix, ...each.keys.prefix]);
  return text === "mean" || names.includes(text) ? { token: text } : otherwise;
}

/* Whatever a fragment says that is none of ours is left as it is. */
function readFragment() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.photo = choiceOf(Number(parts.get("photo") ?? 0), [...photos.keys()], 0);
  const named = photo().layers.findIndex((each) => each.name === parts.get("layer"));
  state.layer = named < 0 ? Math.min(state.layer, photo().layers.length - 1) : named;
  state.head = headIn(layer(), parts.get("head") ?? state.head);
  state.query = queryOf(parts.get("query"), state.query);
  state.direction = choiceOf(parts.get("direction"), ["to", "from"], state.direction);
  state.pointer = choiceOf(parts.get("pointer"), ["ask", "read"], state.pointer);
  state.scale = choiceOf(parts.get("scale"), ["panel", "layer", "all", "log"], state.scale);
  state.colours = choiceOf(parts.get("colours"), Object.keys(TABLES), state.colours);
  state.theme = choiceOf(parts.get("theme"), ["light", "dark", ""], state.theme);
  state.opacity = numberOf(parts.get("opacity"), state.opacity);
  state.threshold = numberOf(parts.get("threshold"), state.threshold, 0.05);
  state.link = parts.get("link") !== "0";
  state.pin = pinOf(parts.get("pin"));
}

function pinOf(text) {
  try {
    const [at, head, query, direction] = JSON.parse(text);
    const of = photo().layers[at];
    return { layer: at, head: headIn(of, head), query: queryOf(String(query), facts.start), direction: direction === "from" ? "from" : "to" };
  } catch {
    return null;
  }
}

/* A head as a layer has it: its number, or "mean". */
function headIn(of, head) {
  if (of.heads === 1) return 0;
  const number = Number(head);
  return head !== "" && Number.isInteger(number) && number >= 0 && number < of.heads ? number : "mean";
}

function chooseHead(row, head) {
  set({ layer: row, head: headIn(photo().layers[row], head) });
}

/* --- what is pressed and moved --- */

const isText = (element) => element instanceof Element && element.matches("input, select, textarea, dialog *");

function moveQuery(down, right) {
  const tokens = state.direction === "to" ? layer().queries : layer().keys;
  if (!tokens.area) return;
  const middle = tokens.placeAt([0.5, 0.5]);
  let place = state.query.point ? tokens.placeAt(photo().toInput(state.query.point)) : -1;
  const { columns, rows } = tokens;
  if (place < 0) place = middle;
  else {
    const row = Math.min(rows - 1, Math.max(0, Math.floor(place / columns) + down));
    place = row * columns + Math.min(columns - 1, Math.max(0, (place % columns) + right));
  }
  const [top, left, height, width] = tokens.boxOf(place);
  hovered = null;
  set({ query: { point: photo().toPhoto([top + height / 2, left + width / 2]) } });
}

function step(list, value, by) {
  return list[(list.indexOf(value) + by + list.length) % list.length];
}

const KEYS = {
  ArrowUp: () => moveQuery(-1, 0), ArrowDown: () => moveQuery(1, 0), ArrowLeft: () => moveQuery(0, -1), ArrowRight: () => moveQuery(0, 1),
  "[": () => chooseHead(Math.max(0, state.layer - 1), state.head),
  "]": () => chooseHead(Math.min(photo().layers.length - 1, state.layer + 1), state.head),
  ",": () => stepHead(-1), ".": () => stepHead(1),
  c: () => press("cls"), m: () => press("mean"),
  r: () => turn(state.direction === "to" ? "from" : "to"),
  " ": () => set({ pointer: state.pointer === "ask" ? "read" : "ask" }),
  p: () => togglePin(), l: () => state.pin && set({ link: !state.link }),
  s: () => set({ scale: step(["panel", "layer", "all", "log"], state.scale, 1) }),
  t: () => toggleTheme(), e: () => savePicture(), "?": () => $("keys").showModal(),
  Escape: () => set({ pin: null, pointer: "ask" }),
};

function stepHead(by) {
  const heads = layer().heads > 1 ? ["mean", ...Array(layer().heads).keys()] : [0];
  set({ head: step(heads, state.head, by) });
}

function press(token) {
  const button = [...$("tokens").querySelectorAll("[data-token]")].find((each) => each.dataset.token === token && !each.disabled);
  if (button) set({ query: { token } });
}

/* Looked at by: the mean of all patches is nobody who could be looked at. */
function turn(direction) {
  const query = direction === "from" && state.query.token === "mean" ? { point: photo().toPhoto([0.5, 0.5]) } : state.query;
  set({ direction, query });
  makeTokens();
  showState();
}

function togglePin() {
  set({ pin: state.pin ? null : { layer: state.layer, head: state.head, query: queryNow(), direction: state.direction } });
}

function toggleTheme() {
  const isDark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  set({ theme: isDark ? "light" : "dark" });
}

function makeTokens() {
  const names = new Set(photo().layers.flatMap((each) => (state.direction === "to" ? each.queries : each.keys).prefix));
  if (state.direction === "to" && photo().layers.some((each) => each.hasMean)) names.add("mean");
  const say = (token) => nameQuery({ query: { token } });
  const chips = [...names].length > 8 ? ["cls", "mean"].filter((name) => names.has(name)) : [...names];
  const rest = [...names].filter((name) => !chips.includes(name));
  const registers = make("div", { className: "choice", ariaLabel: "Registers" });
  registers.setAttribute("role", "group");
  const buttons = [];
  for (const token of chips) {
    const isNext = /^reg[1-9]\d*$/.test(token) && registers.children.length > 0;
    const button = make("button", { type: "button", textContent: isNext ? token.slice(3) : token === "mean" ? "all patches" : say(token), ariaLabel: say(token) });
    button.dataset.token = token;
    button.onclick = () => set({ query: { token } });
    if (!token.startsWith("reg")) buttons.push(button);
    else {
      registers.append(button);
      if (!isNext) buttons.push(registers);
    }
  }
  if (rest.length) {
    const list = make("select", { ariaLabel: "Other tokens" }, make("option", { value: "", textContent: "other tokens" }));
    list.append(...rest.map((token) => make("option", { value: token, textContent: say(token) })));
    list.onchange = () => list.value && set({ query: { token: list.value } });
    buttons.push(list);
  }
  $("tokens").replaceChildren(...buttons);
}

function save(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const fileName = (kind) => `${shorten(layer().name).replace(/[^\w.-]+/g, "_")}-${state.head}.${kind}`;

async function savePicture() {
  const side = 900, views = figures.map((figure) => figure.view), high = Math.round(side / photo().shape), space = 56;
  const canvas = make("canvas", { width: side * views.length + 16 * (views.length - 1), height: high + space });
  const context = canvas.getContext("2d"), source = figures[0].frame.querySelector("img");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  views.forEach((view, i) => {
    context.save();
    context.translate(i * (side + 16), 0);
    context.fillStyle = "black";
    context.font = "600 20px system-ui, sans-serif";
    context.fillText(`${shorten(view.layer.name)}, ${nameHead(view.layer, view.head)}`, 4, 22);
    context.font = "16px system-ui, sans-serif";
    context.fillText(`${nameQuery(view)} ${view.direction === "to" ? "looks at" : "is looked at by"}; ${$("ramp-ends").textContent}`, 4, 44, side - 8);
    context.translate(0, space);
    context.fillRect(0, 0, side, high);
    context.filter = "grayscale(0.6) brightness(0.8)";
    if (source) context.drawImage(source, 0, 0, side, high);
    context.filter = "none";
    context.imageSmoothingEnabled = false;
    drawPanel(context, side, high, photo(), view.panel, marksOf(view), viewNow());
    context.restore();
  });
  save(fileName("png"), await new Promise((done) => canvas.toBlob(done, "image/png")));
}

/* Names come from outside: a cell that begins like a formula is none to a spreadsheet with a quote before it. */
const cellOf = (value) => (typeof value === "number" ? String(value) : `"${value.replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`);

function numbersNow() {
  const header = ["layer", "head", "query", "direction", "token", "row", "column", "weight", "times_uniform", "rank"];
  const view = shownNow, { panel } = view, lines = [header.join(",")];
  if (!panel) return lines.join("\n");
  const shared = [view.layer.name, view.head, nameQuery(view), view.direction];
  panel.tokens.prefix.forEach((name, i) => lines.push([...shared, name, "", "", panel.named[i], panel.named[i] / panel.uniform, ""].map(cellOf).join(",")));
  panel.cells.forEach((value, i) => {
    const at = [Math.floor(i / panel.tokens.columns), i % panel.tokens.columns];
    lines.push([...shared, "patch", ...at, value, value / panel.uniform, panel.rankOf(value)].map(cellOf).join(","));
  });
  return lines.join("\n") + "\n";
}

function listen() {
  document.addEventListener("keydown", (event) => {
    if (isText(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && event.target instanceof HTMLButtonElement) return;
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  for (const id of ["scale", "colours"]) $(id).onchange = () => set({ [id]: $(id).value });
  for (const id of ["opacity", "threshold"]) $(id).oninput = () => set({ [id]: Number($(id).value) / 100 });
  for (const button of $("pointer").children) button.onclick = () => set({ pointer: button.dataset.value });
  for (const button of $("direction").children) button.onclick = () => turn(button.dataset.value);
  $("pin").onclick = togglePin;
  $("link").onclick = () => set({ link: !state.link });
  $("png").onclick = savePicture;
  $("csv").onclick = () => save(fileName("csv"), new Blob([numbersNow()], { type: "text/csv" }));
  $("theme").onclick = toggleTheme;
  $("help").onclick = () => $("keys").showModal();
  new ResizeObserver(() => { thumbs.place(); schedule(); }).observe($("thumbs"));
  new ResizeObserver(schedule).observe($("stage"));
  addEventListener("hashchange", () => {
    if (location.hash === written) return;
    readFragment();
    showPhoto();
  });
}

/* --- beginning --- */

function say() {
  const { size, steps, layers, notes } = photo(), list = [], maps = layers.filter((each) => each.kind === "map");
  const worst = maps.reduce((a, b) => (b.error > a.error ? b : a)), moved = maps.filter((each) => each.verified !== null);
  if (size) list.push(`${photo().name || "The photo"} has ${size[0]} x ${size[1]} pixels${steps.length ? `; ${steps.join("; ")}` : ""}. What the model did not see is dimmed.`);
  list.push(`Values are kept in 8 bits with a scale for each row: what is shown is at most ${worst.error.toExponential(1)} from the map, in ${worst.name}; the numbers say how far each may be.`);
  if (moved.length) list.push(`Each map was put back into its module: the output moved by ${Math.max(...moved.map((each) => each.verified)).toExponential(1)} at most.`);
  for (const each of maps) if (each.verified === null) list.push(`${each.name} is not verified: ${each.unverified}`);
  for (const each of layers) {
    if (each.kind === "rollout") list.push(`Rollout: ${each.of}, each mean of heads mixed half with the identity.`);
    if (each.kind === "relevance") list.push(`Relevance: ${each.of}, in units of the gradient, without what a token has of itself.`);
  }
  list.push(...notes);
  $("notes").replaceChildren(...list.map((text) => make("li", { textContent: text })));
  $("left-out").hidden = !notes.length;
  setText($("left-out"), notes.join(" "));
  const heads = maps.reduce((a, b) => a + b.heads, 0), grids = [...new Set(maps.map((each) => `${each.keys.rows} x ${each.keys.columns}`))];
  setText($("facts"), `${maps.length} layers, ${heads} heads, ${grids.join(", ")} patches`);
}

async function showPhoto() {
  state.layer = Math.min(state.layer, photo().layers.length - 1);
  state.head = headIn(layer(), state.head);
  for (const figure of figures.splice(0)) figure.root.remove();
  await photo().load();
  const choose = (row, head) => chooseHead(row, head);
  thumbs = new Thumbs($("thumbs"), photo(), choose);
  scatter = new Scatter($("scatter"), photo(), choose);
  thumbs.place();
  makeTokens();
  say();
  showState();
  update();
  warmUp();
}

/* The first time code runs it is slow, and a pointer is not to wait for that. */
function warmUp() {
  const { query } = state;
  for (let i = 0; i < 4; i++) {
    state.query = { point: photo().toPhoto([0.4 + 0.05 * i, 0.5]) };
    update();
  }
  state.query = query;
  update();
}

function makeStrip() {
  if (photos.length < 2) return;
  $("strip").append(...photos.map((each, i) => {
    const button = make("button", { type: "button", title: each.name, ariaLabel: each.name || `photo ${i + 1}` });
    button.append(each.src ? make("img", { src: each.src, alt: "" }) : String(i + 1));
    button.onclick = () => set({ photo: i });
    return button;
  }));
}

async function begin() {
  if (!("DecompressionStream" in window)) throw new Error("this browser cannot unpack the file (DecompressionStream); a newer one can");
  photos = facts.photos.map((spec, i) => new Photo(spec, i, facts.places));
  state.layer = photos[0].layers.findLastIndex((each) => each.kind === "map");
  readFragment();
  document.querySelector("main").hidden = false;
  makeStrip();
  await showPhoto();
  listen();
}

window.hookattn = {
  state, read: () => read(), view: () => shownNow, photos: () => photos, numbers: () => numbersNow(), kept: () => keepMass(shownNow.panel.cells, state.threshold), lastUpdateMs: NaN, lastAnswerMs: NaN, updates: 0,
  ready: begin().catch((error) => {
    $("trouble").hidden = false;
    setText($("trouble"), `The page could not be drawn: ${error.message}.`);
    throw error;
  }),
};
