"use strict";
/* Colours that stay apart for all eyes, and from what to what they run. Each table is drawn through its 33 anchors. */

const ANCHORS = {
  inferno:
    "000004 040312 0b0724 150b37 210c4a 2f0a5b 3d0965 4a0c6b 57106e 64156e 71196e 7d1e6d 8a226a 972766 a32c61 b0315b bc3754 " +
    "c73e4c d24644 db503b e45a31 eb6628 f1731d f68013 f98e09 fb9d07 fcac11 fbbc21 f9cb35 f5db4c f2ea69 f3f68a fcffa4",
  viridis:
    "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e 297a8e 26828e 23898e 21918c " +
    "1f988b 1fa088 22a785 28ae80 32b67a 3fbc73 4ec36b 5ec962 70cf57 84d44b 98d83e addc30 c2df23 d8e219 ece51b fde725",
  cividis:
    "00224e 00285b 002e6a 053371 1a386f 273e6e 32436d 3b496c 434e6c 4b546c 535a6d 5a5f6e 61656f 686a71 6f7073 767676 7d7c78 " +
    "848279 8c8878 938e78 9b9476 a39a74 aba072 b4a76f bcae6c c4b468 cdbb63 d5c25e dec958 e7d150 f0d846 f9e03a fee838",
};

const TABLES = Object.fromEntries(Object.entries(ANCHORS).map(([name, text]) => [name, interpolate(text.split(" "))]));

/* 256 x [red, green, blue] */
function interpolate(anchors) {
  const table = new Uint8Array(3 * 256);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (anchors.length - 1), before = Math.min(anchors.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c++) {
      const [a, b] = [before, before + 1].map((k) => parseInt(anchors[k].slice(2 * c, 2 * c + 2), 16));
      table[3 * i + c] = Math.round(a + (b - a) * (at - before));
    }
  }
  return table;
}

const FAR = 3; // times what all but one patch in 200 stay below: a peak higher than that is clipped
const DECADES = 100; // times less than the highest: where a logarithmic scale begins

/* Where the colours of a panel would end, in times uniform; never 0. */
function peakOf(panel, scale) {
  const high = highest(panel.cells, panel.reach);
  if (!high.length) return 1;
  const at = (high.counted - 1) * 0.005, below = Math.floor(at);
  const [upper, lower] = [high[below] ?? 0, high[Math.min(below + 1, high.counted - 1)] ?? 0];
  const most = upper + (lower - upper) * (at - below);
  const unit = panel.uniform || 1;
  const reached = high[0] <= FAR * most ? high[0] : Math.max(most, Math.min(unit, high[0]));
  const share = scale === "panel" && panel.direction === "to" && panel.layer.perUnit ? Math.max(panel.onPatches, 1e-6) : 1;
  return reached / share;
}

/* The highest positive values in order, as many as a quantile of 0.995 needs of all that can have any: small ones may be 0 here. */
function highest(values, reach = null) {
  let counted = 0;
  for (let i = 0; i < values.length; i++) if (values[i] >= 0 && (!reach || reach[i])) counted++;
  const found = [], wanted = Math.floor(Math.max(0, counted - 1) * 0.005) + 2;
  for (let i = 0, least = 0; i < values.length; i++) {
    const v = values[i];
    if (!(v > least)) continue;
    let at = found.length;
    while (at && found[at - 1] < v) at--;
    found.splice(at, 0, v);
    if (found.length > wanted) found.pop();
    if (found.length === wanted) least = found[wanted - 1];
  }
  found.counted = counted;
  return found;
}

/* Gives each panel its `top`, the value that the brightest colour stands for. */
function setScales(panels, scale) {
  const tops = new Map();
  const groupOf = (panel) => {
    if (scale === "panel") return panel;
    // relevance is in units of its own, and a rollout is no layer of the model
    return scale === "layer" || panel.layer.kind !== "map" ? panel.layer : "all";
  };
  // of several layers peaks are compared in units of uniform, as their rows differ in length
  const unit = (panel) => panel.uniform || 1;
  for (const panel of panels) {
    const group = groupOf(panel);
    tops.set(group, Math.max(tops.get(group) ?? 0, peakOf(panel, scale) / unit(panel)));
  }
  for (const panel of panels) panel.top = tops.get(groupOf(panel)) * unit(panel);
}

/* 0 to 1, or NaN */
function brightness(value, top, scale) {
  if (scale === "log") return Math.min(1, Math.max(0, 1 + Math.log(value / top) / Math.log(DECADES)));
  return Math.min(1, Math.max(0, value / top));
}

/* Paints cells into RGBA from a byte on, rows `stride` pixels apart; with `opacity`, dark is see-through. */
function paint(pixels, at, stride, panel, scale, table, opacity) {
  const { rows, columns } = panel.tokens, { cells, reach, top } = panel;
  for (let r = 0, i = 0; r < rows; r++) {
    for (let c = 0, p = at + 4 * r * stride; c < columns; c++, i++, p += 4) {
      const bright = brightness(cells[i], top, scale), known = bright === bright && !(reach && !reach[i]);
      const colour = 3 * (known ? Math.round(255 * bright) : 0);
      pixels[p] = table[colour];
      pixels[p + 1] = table[colour + 1];
      pixels[p + 2] = table[colour + 2];
      pixels[p + 3] = !known ? 0 : opacity === undefined ? 255 : Math.round(255 * opacity * (0.12 + 0.88 * bright));
    }
  }
}

/* The fewest patches that hold a share of what goes to patches, highest first, as the threshold of DINO's script. */
function keepMass(cells, share) {
  const order = Array.from(cells.keys()).sort((a, b) => cells[b] - cells[a] || a - b);
  const wanted = share * cells.reduce((a, b) => a + b, 0) * (1 - 1e-6), kept = new Uint8Array(cells.length);
  let before = 0;
  for (const i of order) {
    if (before >= wanted || !(cells[i] > 0)) break;
    kept[i] = 1;
    before += cells[i];
  }
  return kept;
}
