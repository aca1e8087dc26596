"use strict";
/* Drawing: one panel over the photo, all panels side by side, the scatter of heads. */

const MARK = "#2de2e6"; // seen on all colours of the tables, and on most photos
const scratch = document.createElement("canvas");

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function fit(canvas, width, height) {
  const dense = Math.max(1, window.devicePixelRatio || 1);
  const [w, h] = [Math.max(1, Math.round(width * dense)), Math.max(1, Math.round(height * dense))];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(w / width, 0, 0, h / height, 0, 0);
  context.clearRect(0, 0, width, height);
  context.imageSmoothingEnabled = false;
  return context;
}

function scratchOf(width, height) {
  // setting a size, also the same one, clears it
  if (scratch.width !== width || scratch.height !== height) Object.assign(scratch, { width, height });
  return scratch.getContext("2d", { willReadFrequently: true });
}

/* A panel over the photo: colours, what the model did not see, the query, the border of what holds most. */
function drawPanel(context, width, height, photo, panel, marks, view) {
  const [top, left, bottom, right] = photo.seen;
  if (panel) {
    const { rows, columns, extent } = panel.tokens, inner = scratchOf(columns, rows);
    const image = inner.createImageData(columns, rows);
    paint(image.data, 0, columns, panel, view.scale, TABLES[view.colours], view.opacity);
    inner.putImageData(image, 0, 0);
    const [y, x, high, wide] = photo.boxOnPhoto([0, 0, ...extent]);
    context.save();
    context.beginPath();
    context.rect(left * width, top * height, (right - left) * width, (bottom - top) * height);
    context.clip();
    context.drawImage(scratch, x * width, y * height, wide * width, high * height);
    const place = [x * width, y * height, (wide * width) / columns, (high * height) / rows];
    drawClipped(context, panel, place);
    if (view.threshold < 1) drawBorder(context, keepMass(panel.cells, view.threshold), rows, columns, place);
    context.restore();
  }
  context.fillStyle = "rgb(0 0 0 / 62%)";
  context.fillRect(0, 0, width, top * height);
  context.fillRect(0, bottom * height, width, (1 - bottom) * height);
  context.fillRect(0, top * height, left * width, (bottom - top) * height);
  context.fillRect(right * width, top * height, (1 - right) * width, (bottom - top) * height);
  for (const box of marks) {
    const [y, x, high, wide] = photo.boxOnPhoto(box);
    outline(context, [x * width, y * height, wide * width, high * height]);
  }
}

function outline(context, box) {
  context.lineJoin = "round";
  for (const [colour, line] of [["rgb(0 0 0 / 80%)", 4], [MARK, 2]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: line });
    context.strokeRect(...box);
  }
}

/* A small cross where a patch has more than the colours tell apart. */
function drawClipped(context, panel, [x, y, wide, high]) {
  const columns = panel.tokens.columns, arm = Math.min(3, wide / 4);
  Object.assign(context, { strokeStyle: "black", lineWidth: 1 });
  context.beginPath();
  panel.cells.forEach((value, i) => {
    if (!(value > panel.top * (1 + 1e-6))) return;
    const [cx, cy] = [x + ((i % columns) + 0.5) * wide, y + (Math.floor(i / columns) + 0.5) * high];
    context.moveTo(cx - arm, cy);
    context.lineTo(cx + arm, cy);
    context.moveTo(cx, cy - arm);
    context.lineTo(cx, cy + arm);
  });
  context.stroke();
}

function drawBorder(context, kept, rows, columns, [x, y, wide, high]) {
  const has = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && kept[r * columns + c] === 1;
  context.beginPath();
  for (let r = 0; r <= rows; r++) {
    for (let c = 0; c <= columns; c++) {
      if (has(r, c) !== has(r - 1, c)) {
        context.moveTo(x + c * wide, y + r * high);
        context.lineTo(x + (c + 1) * wide, y + r * high);
      }
      if (has(r, c) !== has(r, c - 1)) {
        context.moveTo(x + c * wide, y + r * high);
        context.lineTo(x + c * wide, y + (r + 1) * high);
      }
    }
  }
  for (const [colour, line] of [["rgb(0 0 0 / 55%)", 3], ["white", 1.4]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: line, lineCap: "round" });
    context.stroke();
  }
}

/* All layers and heads: one canvas, and a button over each panel. */
class Thumbs {
  constructor(root, photo, choose) {
    this.root = root;
    this.photo = photo;
    this.canvas = root.querySelector("canvas");
    this.empty = make("i", { className: "empty" });
    root.replaceChildren(this.canvas, this.empty);
    const most = 16, inLine = (layer) => Math.ceil(layer.heads / Math.ceil(layer.heads / most));
    this.across = Math.max(...photo.layers.map(inLine));
    this.broken = photo.layers.map((layer) => Math.ceil(layer.heads / this.across));
    this.lines = this.broken.map((_, i) => this.broken.slice(0, i).reduce((a, b) => a + b, 0));
    this.buttons = photo.layers.map((layer, row) => this.makeRow(layer, row, choose));
    const numbers = this.broken.some((n) => n > 1) ? [] : [...Array(this.across).keys()];
    this.headers = ["mean", ...numbers].map((text) =>
      root.appendChild(make("span", { className: "head", ariaHidden: "true", textContent: String(text) })));
    this.labels = photo.layers.map((layer) => root.appendChild(labelOf(layer)));
    root.onkeydown = (event) => this.move(event);
  }

  makeRow(layer, row, choose) {
    const heads = layer.heads > 1 ? ["mean", ...Array.from({ length: layer.heads }, (_, h) => h)] : [0];
    return new Map(heads.map((head) => {
      const label = `${layer.name}, ${nameHead(layer, head)}`;
      const button = make("button", { type: "button", className: "thumb", title: label, ariaLabel: label, tabIndex: -1 });
      button.onclick = () => choose(row, head);
      button.dataset.row = row;
      button.dataset.head = head;
      this.root.append(button);
      return [head, button];
    }));
  }

  /* Arrow keys go from panel to panel. */
  move(event) {
    const at = event.target.dataset, step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (at.row === undefined || !step) return;
    event.preventDefault();
    event.stopPropagation();
    const row = Math.min(this.buttons.length - 1, Math.max(0, Number(at.row) + step[0]));
    const heads = [...this.buttons[row].keys()].map(String);
    const next = Math.min(heads.length - 1, Math.max(0, Math.max(0, heads.indexOf(at.head)) + step[1]));
    const button = [...this.buttons[row].values()][next];
    button.focus();
    button.click();
  }

  /* Where everything goes: heads of a layer break into several lines where there are many. */
  place() {
    const width = this.root.clientWidth, label = width < 480 ? 74 : 118, gap = 4, above = 20, beside = 8;
    const shape = Math.max(0.5, Math.min(2, this.photo.inputShape)), lines = this.lines.at(-1) + this.broken.at(-1);
    const wide = (width - label - beside - 2) / (1 + this.across) - gap, tall = ((innerHeight * 0.74) / lines - gap) * shape;
    const cell = Math.max(16, Math.min(96, wide, Math.max(30, tall))), high = cell / shape;
    this.at = (row, column) => {
      const line = this.lines[row] + (column ? Math.floor((column - 1) / this.across) : 0), along = column ? 1 + ((column - 1) % this.across) : 0;
      return [label + along * (cell + gap) + (along ? beside : 0), above + line * (high + gap), cell, high];
    };
    this.total = [label + beside + (1 + this.across) * (cell + gap), above + lines * (high + gap)];
    this.canvas.style.width = `${this.total[0]}px`;
    this.root.style.height = this.canvas.style.height = `${this.total[1]}px`;
    this.buttons.forEach((row, r) => row.forEach((button, head) => put(button, this.at(r, columnOf(this.photo.layers[r], head)))));
    this.headers.forEach((header, c) => put(header, [this.at(0, 0)[0] + c * (cell + gap) + (c ? beside : 0), 0, cell, above - 4]));
    this.labels.forEach((text, r) => put(text, [0, this.at(r, 0)[1], label - 8, high]));
    this.root.classList.toggle("low", high < 30);
  }

  draw(panels, view, selected) {
    const context = fit(this.canvas, ...this.total);
    context.fillStyle = getComputedStyle(this.empty).backgroundColor;
    this.buttons.forEach((row, r) => {
      const shown = panels[r];
      if (shown.size) this.drawRow(context, r, shown, view);
      row.forEach((button, head) => {
        const chosen = r === selected.row && head === selected.head;
        if (chosen !== (button.ariaPressed === "true")) button.ariaPressed = String(chosen);
        button.tabIndex = chosen ? 0 : -1;
        if (button.classList.contains("none") === shown.size > 0) button.classList.toggle("none", !shown.size);
      });
    });
  }

  /* The heads of a layer beside each other in one image, then each to its place. */
  drawRow(context, r, shown, view) {
    const [first] = shown.values(), { rows, columns } = first.tokens;
    if (!rows * columns) return;
    const inner = scratchOf(columns * shown.size, rows), image = inner.createImageData(columns * shown.size, rows);
    let i = 0;
    for (const panel of shown.values()) {
      paint(image.data, 4 * columns * i++, columns * shown.size, panel, view.scale, TABLES[view.colours]);
    }
    inner.putImageData(image, 0, 0);
    i = 0;
    for (const head of shown.keys()) {
      const place = this.at(r, columnOf(this.photo.layers[r], head));
      context.fillRect(...place);
      // larger than its place, a grid loses patches where each pixel takes the nearest one
      context.imageSmoothingEnabled = columns > place[2] * (window.devicePixelRatio || 1);
      context.drawImage(scratch, columns * i++, 0, columns, rows, ...place);
    }
  }
}

function columnOf(layer, head) {
  return head === "mean" || layer.heads === 1 && layer.kind !== "map" ? 0 : head + 1;
}

function put(element, [x, y, width, height]) {
  Object.assign(element.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
}

function shorten(name) {
  return name.replace(/\.attn$/, "");
}

function nameHead(layer, head) {
  if (layer.kind !== "map") return layer.of;
  return head === "mean" ? "mean of heads" : `head ${head}`;
}

function labelOf(layer) {
  const label = make("span", { className: "layer" }, make("b", { textContent: shorten(layer.name), title: layer.name }));
  const verified = layer.verified ?? null;
  if (layer.kind === "map") {
    const title = verified === null ? layer.unverified : `put back into its module, this map moves the output by ${verified.toExponential(1)}`;
    label.append(make("small", { textContent: verified === null ? "not verified" : `✓ ${verified.toExponential(0)}`, title }));
  }
  return label;
}

/* Heads by entropy and distance, or by depth where patches have no distance. */
class Scatter {
  constructor(root, photo, choose) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.svg = svg;
    this.dots = new Map();
    const maps = photo.layers.filter((layer) => layer.kind === "map");
    const far = maps.some((layer) => layer.distance.some((d) => d !== null));
    const points = maps.flatMap((layer) => layer.entropy.map((entropy, head) => ({
      layer, head, entropy, across: far ? layer.distance[head] : layer.number })));
    const shown = points.filter((p) => p.entropy !== null && p.across !== null && p.across !== undefined);
    const [width, height, left, below] = [560, 260, 44, 36];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${shown.length} heads by mean attention distance and entropy; the panels above are the same heads`);
    const most = (list) => niceTop(Math.max(1e-9, ...list));
    const [xTop, yTop] = [most(shown.map((p) => p.across)), most(shown.map((p) => p.entropy))];
    const x = (v) => left + (v / xTop) * (width - left - 12), y = (v) => height - below - (v / yTop) * (height - below - 10);
    this.axes(x, y, xTop, yTop, far, [width, height, left, below]);
    for (const p of shown) this.dot(p, x(p.across), y(p.entropy), maps.length, choose);
    root.replaceChildren(svg);
  }

  add(tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return this.svg.appendChild(element);
  }

  axes(x, y, xTop, yTop, far, [width, height, left, below]) {
    for (let i = 0; i <= 4; i++) {
      const [atX, atY] = [(xTop * i) / 4, (yTop * i) / 4];
      this.add("line", { x1: left, x2: width - 12, y1: y(atY), y2: y(atY), class: "line" });
      this.add("text", { x: left - 6, y: y(atY) + 4, "text-anchor": "end" }, String(Number(atY.toPrecision(2))));
      this.add("text", { x: x(atX), y: height - below + 16, "text-anchor": "middle" }, String(Number(atX.toPrecision(3))));
    }
    this.add("text", { x: width - 12, y: height - 4, "text-anchor": "end" }, far ? "mean attention distance, pixels of the input →" : "layer →");
    this.add("text", { x: left, y: height - 4 }, "↑ mean entropy, nats");
  }

  dot(p, cx, cy, depth, choose) {
    const dot = this.add("circle", { cx, cy, r: 4.5, class: "dot" });
    const at = Math.round(40 + (170 * p.layer.number) / Math.max(1, depth - 1));
    dot.style.fill = `rgb(${TABLES.viridis.slice(3 * at, 3 * at + 3).join(" ")})`;
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `${p.layer.name}, head ${p.head}`;
    dot.append(title);
    dot.addEventListener("click", () => choose(p.layer.number, p.head));
    this.dots.set(`${p.layer.number} ${p.head}`, dot);
  }

  select(row, head) {
    for (const [name, dot] of this.dots) {
      const [layer, own] = name.split(" ").map(Number);
      dot.classList.toggle("chosen", layer === row && own === head);
      dot.classList.toggle("beside", layer === row && own !== head);
      if (layer === row && own === head) this.svg.append(dot);
    }
  }
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10].map((n) => n * power).find((n) => n >= value);
}
