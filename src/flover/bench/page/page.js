"use strict";
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");

function element(tag, attributes = {}, text = null) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text; // never innerHTML: names come from data
  return node;
}

function showTip(lines, x, y) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

/* theme: the system's, or what was chosen on this page. A browser may refuse storage to a file: then it just isn't kept */
const themeKey = `flover-report:${location.pathname}`;
const redraws = [];
{
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const apply = () => {
    button.textContent = now() === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} colours`);
    redraws.forEach((draw) => draw());
  };
  try {
    const kept = localStorage.getItem(themeKey);
    if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
  } catch { /* not kept */ }
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = now() === "dark" ? "light" : "dark";
    try { localStorage.setItem(themeKey, now()); } catch { /* not kept */ }
    apply();
  });
  dark.addEventListener("change", apply);
  button.hidden = false;
  apply();
}

/* tables */
const cellValue = (cell) => (cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v));
function compare(a, b, up) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // blanks last, either way
  const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return up ? order : -order;
}
const contents = new Map(); // table id -> cells, as written, for the charts
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  contents.set(table.id, [...body.rows].map((row) => [...row.cells].map(cellValue)));
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (body.rows[0] && body.rows[0].cells[column].classList.contains("num")) head.classList.add("num");
    head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [cellValue(row.cells[column]), row]);
      rows.sort(([a], [b]) => compare(a, b, up));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

/* commands */
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

/* charts: lines or bars of a table */
const MARKS = [ // disc, square, triangle, diamond, hourglass, cross, plus, triangle down
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-3.5-3.5h7v7h-7z", "M0-5L4.5 3.5h-9z", "M0-5L5 0L0 5L-5 0z", "M-4.5-4.5h9L-4.5 4.5h9z",
  "M-4-4L4 4M4-4L-4 4", "M-5 0h10M0-5v10", "M-4.5-3.5h9L0 5z",
];
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "4 2", "12 4", "4 4", "6 2 1 2"];
const digits = (v) => (typeof v !== "number" ? v : Math.abs(v) >= 1e6 || (v && Math.abs(v) < 1e-3) ? si(v) : Number(v.toPrecision(4)).toLocaleString("en"));
function si(v) {
  const at = Math.floor(Math.log10(Math.abs(v)) / 3);
  const unit = { 2: "M", 3: "G", 4: "T", "-1": "m", "-2": "µ", "-3": "n" }[at];
  return unit ? `${Number((v / 1000 ** at).toPrecision(3))} ${unit}` : v.toExponential(1);
}
function ticks(low, high, count) {
  const raw = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((k) => k * power >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}
function decades(low, high) { // 1, 2, 5 of each, or only the powers where those are many
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const k of high / low > 1e3 ? [1] : [1, 2, 5]) if (k * 10 ** power >= low && k * 10 ** power <= high) found.push(Number(`${k}e${power}`));
  }
  return found;
}
function swatch(i, bars) {
  const icon = element("svg:svg", { width: 34, height: 14, viewBox: "-17 -7 34 14", "aria-hidden": "true", style: `color: var(--s${i})` });
  if (bars) {
    icon.append(element("svg:rect", { x: -8, y: -6, width: 16, height: 12, fill: "currentColor" }));
    return icon;
  }
  icon.append(element("svg:path", { d: "M-17 0H17", stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": DASHES[i] }));
  icon.append(element("svg:path", { d: MARKS[i], fill: "currentColor", stroke: "currentColor", "stroke-width": 1.5 }));
  return icon;
}
// a system has the same colour in every chart; the others take what is left
const FIXED = { fused: 0, concurrent: 1, serial: 6, dynamic: 4 };
function styles(names) {
  const taken = names.map((name) => FIXED[String(name).split(/[:, ]/)[0]]);
  const used = new Set();
  return taken.map((want) => {
    const free = [0, 1, 2, 3, 4, 5, 6, 7].filter((i) => !used.has(i));
    const i = used.has(want) || want === undefined ? free.find((k) => !taken.includes(k)) ?? free[0] ?? used.size % 8 : want;
    used.add(i);
    return i;
  });
}
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function chart(figure) {
  const spec = JSON.parse(figure.dataset.chart);
  const table = document.getElementById(figure.dataset.table);
  const rows = contents.get(table.id);
  const names = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  const unique = (column) => [...new Set(rows.map((row) => row[column]))];
  const controls = element("div", { class: "choose" });
  const picked = new Map(); // column -> select
  const choose = (label, options) => {
    const select = element("select");
    options.forEach(([value, text]) => select.append(element("option", { value }, text)));
    const wrap = element("label", {}, label);
    wrap.append(select);
    controls.append(wrap);
    select.addEventListener("change", () => draw());
    return select;
  };
  const shown = choose("show", spec.ys.map(([name], i) => [i, name]));
  shown.parentNode.hidden = spec.ys.length < 2;
  for (const column of spec.filters) picked.set(column, choose(names[column], unique(column).map((v) => [v, v])));
  const logY = element("input", { type: "checkbox" }), logLabel = element("label", {}, "log scale ");
  logLabel.append(logY);
  controls.append(logLabel);
  logY.addEventListener("change", () => draw());
  const plot = element("div"), legend = element("ul", { class: "legend" });
  figure.append(controls, plot, legend);
  figure.hidden = false;

  function draw() {
    const width = Math.max(280, plot.clientWidth), height = width < 500 ? 270 : 330;
    const [title, columns] = spec.ys[Number(shown.value)];
    const lines = (spec.series === null ? [null] : unique(spec.series)).flatMap((value) => columns.map(([label, y]) => ({
      y, value, name: [value, columns.length > 1 || value === null ? label : null].filter((part) => part !== null).join(", ") })));
    const look = styles(lines.map((line) => line.name));
    const chosen = rows.filter((row) => [...picked].every(([column, select]) => String(row[column]) === select.value));
    const xs = [...new Set(chosen.map((row) => row[spec.x]))];
    if (!spec.bars) xs.sort((a, b) => a - b);
    const points = lines.map((line) => xs.flatMap((x) => {
      const mine = chosen.filter((row) => row[spec.x] === x && (line.value === null || row[spec.series] === line.value));
      const found = mine.map((row) => row[line.y]).filter(Number.isFinite);
      if (!found.length) return [];
      if (!spec.curve) return [[x, mean(found), found.length]];
      return found.length > 1 ? [[x, found[0], 1], [x, found[found.length - 1], 1]] : [[x, found[0], 1]]; // a jump
    }));
    legend.replaceChildren(...lines.flatMap((line, i) => {
      if (lines.length < 2 || !points[i].length) return [];
      const item = element("li", {}, line.name);
      item.prepend(swatch(look[i], spec.bars));
      return [item];
    }));
    const values = points.flat().map((point) => point[1]), least = Math.min(...values), most = Math.max(...values);
    logLabel.hidden = spec.bars || !(least > 0 && most / least > 20);
    const logs = logY.checked && !logLabel.hidden, scaleY = logs ? Math.log10 : Number;
    const close = !spec.bars && least > 0.6 * most && most > least; // lines far from zero: the axis begins near them
    const low = logs ? least * 0.9 : close ? least - 0.2 * (most - least) : Math.min(0, least), top = Math.max(most, low + 1e-12);
    const marksY = logs ? decades(low, top) : ticks(low, top, 5);
    const high = Math.max(top, marksY[marksY.length - 1] ?? top) * (top > 0 ? 1.03 : 1);
    const left = 12 + 7 * Math.max(1, ...marksY.map((v) => String(digits(v)).length)), right = 16, bottom = 48, up = 20;
    const log = !spec.bars && !spec.curve && xs.length > 3 && xs[0] > 0 && xs[xs.length - 1] / xs[0] >= 8 && xs[1] / xs[0] >= 1.4;
    const scale = log ? Math.log2 : Number;
    const px = (x) => (spec.bars
      ? left + ((xs.indexOf(x) + 0.5) * (width - left - right)) / xs.length
      : left + 8 + ((scale(x) - scale(xs[0])) / (scale(xs[xs.length - 1]) - scale(xs[0]) || 1)) * (width - left - right - 16));
    const py = (v) => height - bottom - ((scaleY(v) - scaleY(low)) / (scaleY(high) - scaleY(low))) * (height - bottom - up);
    const where = [...picked].map(([column, select]) => `${names[column]} ${select.value}`).join(", ");
    const svg = element("svg:svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `${title} by ${names[spec.x]}${where && `, ${where}`}; ${lines.map((line) => line.name).join(", ")}. The numbers are in the table below.` });
    const put = (tag, attributes, text = null) => svg.appendChild(element(`svg:${tag}`, attributes, text));
    for (const v of marksY) {
      put("line", { class: "grid", x1: left, x2: width - right, y1: py(v), y2: py(v) });
      put("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, digits(v));
    }
    put("line", { class: "axis", x1: left, x2: width - right, y1: py(low), y2: py(low) });
    let free = -1; // labels leave each other room, and the last of a log axis its own
    const labelled = spec.bars || log || xs.length <= 9 ? xs : ticks(xs[0], xs[xs.length - 1], width < 500 ? 5 : 9);
    const last = log ? xs[xs.length - 1] : null, limit = log ? px(last) - String(digits(last)).length * 3.5 - 8 : width + 6;
    for (const x of labelled) {
      let label = String(digits(x));
      const room = (width - left) / xs.length;
      if (spec.bars && label.length * 6.5 > room && xs.length <= 8) label = `${label.slice(0, Math.max(4, room / 7))}…`;
      const half = label.length * 3.5;
      if (px(x) - half < free || (px(x) + half > limit && x !== last)) continue;
      put("text", { x: px(x), y: height - bottom + 18, "text-anchor": "middle" }, label);
      free = px(x) + half + 8;
    }
    put("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, names[spec.x] + (log ? " (log)" : ""));
    put("text", { x: 4, y: 12 }, title);
    const wide = spec.bars ? Math.min(48, ((width - left - right) / xs.length) * 0.8 / lines.length) : 0;
    points.forEach((line, i) => {
      const color = `color: var(--s${look[i]})`, mark = MARKS[look[i]];
      if (spec.bars) {
        for (const [x, v] of line) {
          const from = px(x) + (i - lines.length / 2) * wide, y = Math.min(py(v), py(0));
          put("rect", { x: from, y, width: Math.max(1, wide - 1.5), height: Math.abs(py(v) - py(0)), fill: "currentColor", style: color });
        }
        return;
      }
      const at = line.map(([x, v]) => `${px(x).toFixed(1)} ${py(v).toFixed(1)}`), pen = { stroke: "currentColor", style: color };
      put("path", { ...pen, d: line.length ? `M${at.join("L")}` : "", fill: "none", "stroke-width": 2, "stroke-dasharray": DASHES[look[i]] });
      const sparse = line.length > 40 ? Math.ceil(line.length / 12) : 1; // of a long curve, some marks tell the lines apart
      at.filter((_, k) => k % sparse === 0).forEach((place) => {
        put("path", { ...pen, d: mark, transform: `translate(${place})`, fill: "currentColor", "stroke-width": 1.5 });
      });
    });
    const cursor = put("line", { class: "axis", y1: up, y2: height - bottom, x1: -9, x2: -9, "stroke-dasharray": "3 3" });
    const point = (event) => {
      const at = event.clientX - svg.getBoundingClientRect().left;
      const x = xs.reduce((best, v) => (Math.abs(px(v) - at) < Math.abs(px(best) - at) ? v : best), xs[0]);
      cursor.setAttribute("x1", px(x));
      cursor.setAttribute("x2", px(x));
      const said = points.flatMap((line, i) => {
        const [, v, repeats] = line.filter((p) => (spec.curve ? p[0] <= x : p[0] === x)).pop() || [];
        return v === undefined ? [] : [`${lines[i].name}: ${digits(v)}${repeats > 1 ? ` (mean of ${repeats})` : ""}`];
      });
      showTip([`${names[spec.x]} ${digits(x)}`, ...said], event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); hideTip(); });
    plot.replaceChildren(svg);
  }
  return [plot, draw];
}

/* the running batch: rows over steps, drawn once; the pointer only moves a frame over it */
const AWAY = { abort: "x", error: "x", preempted: "v" };
function timeline(box) {
  const { names, steps, palette, phases } = JSON.parse(box.querySelector("script").textContent);
  const numRows = Math.max(1, ...steps.map((step) => step.ids.length));
  const scroll = element("div", { class: "scroll" }), gutter = element("div", { class: "rows", "aria-hidden": "true" });
  const area = element("div", { class: "area" }), frame = element("div", { class: "cursor", hidden: "" });
  const label = `Rows of the running batch over ${steps.length} steps; arrow keys move, and the cell is read out. The requests are in the table below.`;
  const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": label });
  area.append(canvas, frame);
  scroll.append(gutter, area);
  box.append(scroll);
  const rowHeight = numRows <= 12 ? 26 : numRows <= 32 ? 16 : 9, top = 22, strip = 44;
  const gridHeight = top + numRows * rowHeight, height = gridHeight + strip + 14;
  const maxKv = Math.max(0, ...steps.map((step) => step.kv[1]));
  let cell = 4, at = null;
  for (let row = 0; row < numRows; row += Math.ceil(numRows / 16)) gutter.append(element("span", { style: `top: ${top + (row + 0.5) * rowHeight}px` }, row));
  if (maxKv) gutter.append(element("span", { style: `top: ${gridHeight + 14 + strip / 2}px` }, "KV"));

  function draw() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    // at least 4 px a step, within what a canvas may be wide
    cell = Math.min(Math.max(4, Math.min(28, (scroll.clientWidth - gutter.offsetWidth) / steps.length)), 16000 / ratio / steps.length);
    const width = Math.ceil(cell * steps.length);
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.width = area.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const g = canvas.getContext("2d"), colors = getComputedStyle(gutter); // a canvas needs them resolved
    const ink = getComputedStyle(box).color, card = colors.backgroundColor, line = colors.borderRightColor;
    g.scale(ratio, ratio);
    g.font = "11px system-ui, sans-serif";
    const hatch = (color, back) => {
      const tile = element("canvas", { width: 6, height: 6 }), t = tile.getContext("2d");
      t.strokeStyle = color;
      t.lineWidth = 1.2;
      t.beginPath();
      for (const d of [-6, 0, 6]) { t.moveTo(d, back ? 0 : 6); t.lineTo(d + 6, back ? 6 : 0); }
      t.stroke();
      return g.createPattern(tile, "repeat");
    };
    const lightHatch = hatch("#ffffffa0", false), darkHatch = hatch("#55524e", true);
    g.fillStyle = ink;
    for (const n of ticks(0, steps.length - 1, width / 90)) if (Number.isInteger(n) && n * cell < width - 24) g.fillText(steps[n].step, n * cell + 2, 14);
    for (let row = 0; row < numRows; row++) {
      const y = top + row * rowHeight, h = rowHeight - 1;
      for (let from = 0; from < steps.length;) { // one rectangle a stretch of the same request and phase
        const id = steps[from].ids[row], phase = steps[from].phases[row];
        let to = from + 1;
        while (to < steps.length && steps[to].ids[row] === id && steps[to].phases[row] === phase) to++;
        if (id !== undefined) {
          const x = from * cell, w = (to - from) * cell, color = palette[id % palette.length];
          g.fillStyle = phase === "x" ? "#cfcbc6" : color;
          if (phase === "-") { g.strokeStyle = color; g.lineWidth = 1.5; g.strokeRect(x + 1, y + 1, w - 2, h - 2); } else g.fillRect(x, y, w, h);
          if (phase === "p") { g.fillStyle = "#00000073"; g.fillRect(x, y, w, h); g.fillStyle = lightHatch; g.fillRect(x, y, w, h); }
          if (phase === "x") { g.fillStyle = darkHatch; g.fillRect(x, y, w, h); }
          if (phase === "d" && rowHeight >= 14 && w > g.measureText(names[id]).width + 16) { g.fillStyle = "#16181d"; g.fillText(names[id], x + 9, y + h / 2 + 4); }
        }
        from = to;
      }
    }
    const size = Math.min(6, rowHeight / 2 - 1), middle = (row) => top + (row + 0.5) * rowHeight;
    const mark = (points) => {
      g.beginPath();
      points.forEach(([x, y]) => g.lineTo(x, y));
      g.closePath();
      Object.assign(g, { fillStyle: "#ffffff", strokeStyle: "#16181d", lineWidth: 1 });
      g.fill();
      g.stroke();
    };
    const stroke = (...lines) => {
      g.beginPath();
      for (const [x1, y1, x2, y2] of lines) { g.moveTo(x1, y1); g.lineTo(x2, y2); }
      g.stroke();
    };
    steps.forEach((step, i) => {
      const x = i * cell;
      for (const [row] of step.joins) mark([[x, middle(row) - size], [x + size * 1.3, middle(row)], [x, middle(row) + size]]);
      for (const [src, dst] of step.moves) {
        g.strokeStyle = ink;
        g.globalAlpha = numRows > 32 ? 0.5 : 1; // many cross each other
        g.setLineDash([2, 2]);
        stroke([x, middle(src), x + cell / 2, middle(dst)]);
        g.setLineDash([]);
        g.globalAlpha = 1;
        g.fillStyle = "#16181d";
        g.beginPath();
        g.arc(x + cell / 2, middle(dst), size * 0.6, 0, 7);
        g.fill();
      }
      for (const [row, , reason] of step.leaves) {
        const y = middle(row), kind = AWAY[reason];
        if (kind === "v") { mark([[x - size, y - size], [x + size, y - size], [x, y + size]]); continue; }
        for (const [color, wide] of [[card, 5], [ink, 2.4]]) { // a rim, to be seen on any colour
          g.strokeStyle = color;
          g.lineWidth = wide;
          if (kind === "x") stroke([x - size, y - size, x + size, y + size], [x + size, y - size, x - size, y + size]);
          else stroke([x, y - rowHeight / 2 + 1, x, y + rowHeight / 2 - 2]);
        }
      }
      if (maxKv) { // reserved behind, in use before
        g.fillStyle = line;
        const from = Math.floor(x), wide = Math.floor(x + cell) - from; // whole pixels, or seams show
        const bar = (bytes) => g.fillRect(from, gridHeight + 14 + strip * (1 - bytes / maxKv), wide, (strip * bytes) / maxKv);
        bar(step.kv[1]);
        g.fillStyle = "#7d93ad";
        bar(step.kv[0]);
      }
    });
    if (at) moveTo(...at);
  }
  function moveTo(x, row, clientX, clientY) {
    at = [x, row];
    const step = steps[x], id = step.ids[row];
    frame.hidden = false;
    const place = { left: x * cell - 2, width: Math.max(cell, 3) + 4, top: top + row * rowHeight - 2, height: rowHeight + 3 };
    for (const [side, pixels] of Object.entries(place)) frame.style[side] = `${pixels}px`;
    if (clientX === undefined) return;
    const said = [`step ${step.step} (${digits(step.ms)} ms), row ${row}`];
    if (id === undefined) said.push("idle");
    else said.push(`request ${names[id]}`, `${phases[step.phases[row]]}, ${step.tokens[row]} token${step.tokens[row] === 1 ? "" : "s"}`);
    for (const [at, who] of step.joins) if (at === row) said.push(`${names[who]} joins`);
    for (const [at, who, reason] of step.leaves) if (at === row) said.push(`${names[who]} left row ${at}: ${reason}`);
    for (const [src, dst] of step.moves) if (dst === row) said.push(`moved here from row ${src}`);
    if (maxKv) said.push(`KV ${digits(step.kv[0])} of ${digits(step.kv[1])} bytes reserved`);
    showTip(said, clientX, clientY);
  }
  const point = (event) => {
    const rect = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - rect.left) / cell), row = Math.floor((event.clientY - rect.top - top) / rowHeight);
    if (x >= 0 && x < steps.length && row >= 0 && row < numRows) moveTo(x, row, event.clientX, event.clientY); else leave();
  };
  const leave = () => { frame.hidden = true; hideTip(); };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-steps.length, 0], End: [steps.length, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    const [x, row] = at || [0, 0], clamp = (v, n) => Math.max(0, Math.min(n - 1, v));
    const next = [clamp(x + by[0], steps.length), clamp(row + by[1], numRows)];
    const left = next[0] * cell, seen = scroll.clientWidth - gutter.offsetWidth;
    if (left < scroll.scrollLeft || left > scroll.scrollLeft + seen - cell) scroll.scrollLeft = left - seen / 2;
    const rect = canvas.getBoundingClientRect();
    moveTo(...next, rect.left + left, rect.top + top + next[1] * rowHeight);
  });
  return [scroll, draw];
}

for (const box of document.querySelectorAll(".chart, .timeline")) {
  try {
    const [watched, draw] = box.classList.contains("chart") ? chart(box) : timeline(box);
    let width = -1;
    new ResizeObserver(() => { if (watched.clientWidth !== width) { width = watched.clientWidth; draw(); } }).observe(watched);
    if (box.classList.contains("timeline")) redraws.push(draw); // a canvas does not follow the theme by itself
  } catch (error) {
    console.error(error); // one that cannot be drawn leaves the others, and its table
  }
}
