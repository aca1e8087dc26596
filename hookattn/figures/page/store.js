"use strict";
/* What the file holds: rows of attention in bytes, and where their tokens lie. */

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const packed = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/* Tokens along one axis: some with names first, then patches of a grid, in one window or several. */
class Tokens {
  constructor(spec, table) {
    [this.rows, this.columns] = spec.grid;
    this.prefix = spec.prefix;
    this.extent = spec.extent;
    this.seen = spec.seen;
    this.spread = spec.spread;
    this.windows = spec.windows;
    this.places = spec.places === null ? null : table[spec.places];
    this.area = this.rows * this.columns;
    this.placed = this.places ? this.places.length / this.windows : this.area; // places of a window
    this.count = this.prefix.length + this.placed / this.spread;
  }

  /* The patch under a point of the model's input; -1 where none is. */
  placeAt([y, x]) {
    const cell = (f, n, extent, seen) => {
      if (f < 0 || f > 1 || (seen < 1 && f > seen - 1e-6 / n)) return -1;
      return Math.min(n - 1, Math.floor((f / extent) * n + 1e-6));
    };
    const row = cell(y, this.rows, this.extent[0], this.seen[0]);
    const column = cell(x, this.columns, this.extent[1], this.seen[1]);
    return row < 0 || column < 0 || !this.area ? -1 : row * this.columns + column;
  }

  /* [top, left, height, width] of a patch, in fractions of the model's input. */
  boxOf(place) {
    const height = this.extent[0] / this.rows, width = this.extent[1] / this.columns;
    return [Math.floor(place / this.columns) * height, (place % this.columns) * width, height, width];
  }

  /* [[window, token], ...] that stand for a patch, or bear a name. */
  find(query) {
    if (typeof query === "string") {
      const at = this.prefix.indexOf(query);
      return at < 0 ? [] : Array.from({ length: this.windows }, (_, w) => [w, at]);
    }
    if (query < 0) return [];
    if (!this.places) return [[0, this.prefix.length + query]];
    this.standing ??= this.index();
    return this.standing.get(query) ?? [];
  }

  index() {
    const found = new Map();
    this.places.forEach((place, i) => {
      if (place < 0) return;
      if (!found.has(place)) found.set(place, []);
      found.get(place).push([Math.floor(i / this.placed), this.prefix.length + Math.floor((i % this.placed) / this.spread)]);
    });
    return found;
  }
}

/* The maps of one layer, of one photo. Bytes grow with the square root, so that small values keep their digits. */
class Layer {
  constructor(spec, table, number) {
    Object.assign(this, spec);
    this.number = number;
    this.queries = new Tokens(spec.queries, table);
    this.keys = new Tokens(spec.keys, table);
    this.rowCount = this.queries.count + 1; // the last one is the mean of all patches
    this.levels = Float64Array.from({ length: 256 }, (_, q) =>
      spec.signed ? (Math.sign(q - 128) * (q - 128) ** 2) / 127 ** 2 : (q / 255) ** 2);
  }

  async load() {
    const whole = await unpack(this.block);
    const rows = this.keys.windows * this.heads * this.rowCount;
    this.tops = new Float32Array(whole, 0, rows);
    this.bytes = new Uint8Array(whole, 4 * rows);
  }

  /* What a query stands for here: [[window, row or column, weight], ...]; none where this layer has no such token. */
  select(query, direction, photo) {
    const tokens = direction === "to" ? this.queries : this.keys;
    if (query.token === "mean") {
      if (direction !== "to" || !this.hasMean) return [];
      return Array.from({ length: this.keys.windows }, (_, w) => [w, this.queries.count, 1]);
    }
    const found = tokens.find(query.token ?? tokens.placeAt(photo.toInput(query.point)));
    return found.map(([w, t]) => [w, t, direction === "to" ? 1 / found.length : 1]);
  }

  /* One head's panel: what each patch has, what each named token has, and which patches can have any. */
  panel(head, selected, direction) {
    const tokens = direction === "to" ? this.keys : this.queries;
    const panel = new Panel(this, head, direction, tokens);
    const heads = head === "mean" ? Array.from({ length: this.heads }, (_, h) => h) : [head];
    for (const h of heads) {
      for (const [w, at, weight] of selected) this.lay(panel, h, w, at, weight / heads.length);
    }
    return panel;
  }

  lay(panel, head, w, at, weight) {
    const { tokens, direction, cells } = panel;
    const first = (w * this.heads + head) * this.rowCount, keys = this.keys.count, { bytes, tops, levels } = this;
    const named = tokens.prefix.length, forward = direction === "to";
    let from = forward ? (first + at) * keys : first * keys + at, top = forward ? tops[first + at] * weight : 0;
    panel.rowTop = Math.max(panel.rowTop, ...(forward ? [tops[first + at]] : tops.subarray(first, first + this.queries.count)));
    const step = forward ? 1 : keys;
    for (let t = 0; t < tokens.count; t++, from += step) {
      if (!forward) top = tops[first + t] * weight;
      const value = top * levels[bytes[from]];
      if (t < named) panel.named[t] += value;
      else if (!tokens.places) cells[t - named] += value;
      else this.spread(panel, w, t - named, value);
    }
  }

  spread(panel, w, patch, value) {
    const { places, spread, placed } = panel.tokens;
    panel.reach ??= new Uint8Array(panel.cells.length);
    for (let s = 0; s < spread; s++) {
      const place = places[w * placed + patch * spread + s];
      if (place < 0) panel.padding += value / spread;
      else {
        panel.cells[place] += panel.direction === "to" ? value / spread : value;
        panel.reach[place] = 1;
      }
    }
  }
}

class Panel {
  constructor(layer, head, direction, tokens) {
    Object.assign(this, { layer, head, direction, tokens, padding: 0, reach: null, rowTop: 0 });
    this.cells = new Float64Array(tokens.area);
    this.named = new Float64Array(tokens.prefix.length);
    this.uniform = layer.perUnit ? 1 / layer.keys.count : NaN;
  }

  get onPatches() {
    return this.cells.reduce((a, b) => a + b, 0);
  }

  entropy() {
    const total = this.onPatches + this.named.reduce((a, b) => a + b, 0) + this.padding;
    let found = 0;
    for (const list of [this.cells, this.named]) {
      for (const v of list) if (v > 0) found -= (v / total) * Math.log(v / total);
    }
    return found;
  }

  rankOf(value) {
    let higher = 1;
    for (const v of this.cells) if (v > value) higher++;
    return higher;
  }

  /* How far a value may be from what was stored: half a step of its byte, in the row's own scale. */
  doubt(value) {
    const half = this.layer.signed ? 127 : 255, top = this.rowTop || 1;
    const step = Math.sqrt(Math.abs(value) / top) + 0.5 / half;
    return top * (step ** 2 - Math.abs(value) / top);
  }
}

class Photo {
  constructor(spec, number, table) {
    Object.assign(this, spec);
    this.number = number;
    this.layers = spec.layers.map((layer, i) => new Layer(layer, table, i));
    const { rows, columns } = this.layers.map((layer) => layer.keys).find((keys) => keys.area) ?? { rows: 1, columns: 1 };
    this.shape = this.size ? this.size[1] / this.size[0] : columns / rows; // width over height
    this.inputShape = (this.shape * this.side[1]) / this.side[0];
  }

  toInput([y, x]) {
    const p = [(y - this.origin[0]) / this.side[0], (x - this.origin[1]) / this.side[1]];
    return p.map((f) => (Math.abs(f) < 1e-9 ? 0 : Math.abs(f - 1) < 1e-9 ? 1 : f));
  }

  toPhoto([y, x]) {
    return [this.origin[0] + y * this.side[0], this.origin[1] + x * this.side[1]];
  }

  boxOnPhoto([top, left, height, width]) {
    const [y, x] = this.toPhoto([top, left]);
    return [y, x, height * this.side[0], width * this.side[1]];
  }

  load() {
    this.loading ??= Promise.all(this.layers.map((layer) => layer.load()));
    return this.loading;
  }
}
