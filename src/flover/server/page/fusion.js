/* Draws a History: rows x steps, one colour a request, and strips of requests and KV memory below. */

import { FOOT, GAP, GUTTER, STRIP, darker, leaveMark, pauseMark, strips, theme } from "./paint.js";

const PHASES = ["decode", "prefill", "no token this step", "dead row, computed in vain"];

export class Fusion {
  constructor(canvas, history) {
    this.canvas = canvas;
    this.history = history;
    this.pen = canvas.getContext("2d");
    this.zoom = 0; // steps shown; 0: what fits the pace
    this.columns = 120;
    this.frozen = null; // the place after the last step shown, while paused
    this.cell = null; // { place, row } looked at
    this.only = ""; // the label of the request that is not paled
    this.kvBytes = 0;
    this.queued = false;
    this.dark = new Map();
    this.restyle();
    new ResizeObserver(() => this.redraw()).observe(canvas);
  }

  restyle() {
    this.colors = theme();
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const pen = tile.getContext("2d");
    pen.strokeStyle = "rgba(255, 255, 255, 0.6)";
    pen.lineWidth = 1.4;
    for (const shift of [-6, 0, 6]) {
      pen.moveTo(shift, 6);
      pen.lineTo(shift + 6, 0);
    }
    pen.stroke();
    this.hatch = this.pen.createPattern(tile, "repeat");
    this.redraw();
  }

  redraw() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      this.#draw();
    });
  }

  pause(on) {
    this.frozen = on ? this.history.dropped + this.history.steps.length : null;
    this.redraw();
  }

  /* The cell at a point of the page, or null. */
  at(x, y) {
    const box = this.canvas.getBoundingClientRect();
    const { first, wide, high, rows, count } = this.view;
    const column = Math.floor((x - box.left - GUTTER) / wide), row = Math.floor((y - box.top) / high);
    if (column < 0 || column >= count || row < 0 || row >= rows) return null;
    return { place: first + this.history.dropped + column, row };
  }

  /* Move what is looked at by columns and rows, within what is shown; the newest cell first. */
  step(dx, dy) {
    const { first, count, rows } = this.view;
    if (!count) return;
    const low = first + this.history.dropped, high = low + count - 1;
    const from = this.cell ?? { place: high + (dx < 0 ? 1 : 0), row: 0 };
    const clamp = (v, a, b) => Math.min(Math.max(v, a), b);
    this.cell = { place: clamp(from.place + dx, low, high), row: clamp(from.row + dy, 0, rows - 1) };
    this.redraw();
  }

  /* What is looked at, in words; "" if nothing is. */
  words() {
    const step = this.cell && this.history.steps[this.cell.place - this.history.dropped];
    if (!step) return "";
    const { row } = this.cell;
    const head = `Step ${step.n}, row ${row}`;
    const left = step.leave.find(([r]) => r === row);
    const gone = left ? `; here ${this.history.look(left[1]).label} left: ${left[2]}` : "";
    if (row >= step.rows.length) return `${head}: idle. ${step.rows.length} rows, ${step.wait} waiting${gone}.`;
    const number = step.rows[row];
    const tokens = step.pre.find(([r]) => r === row);
    const phase = PHASES[step.kinds[row]] + (tokens ? ` of ${tokens[1]} tokens` : "");
    const moved = step.move.find(([, to]) => to === row);
    const id = this.history.requests.get(number)?.id ?? "";
    return `${head}: ${this.history.look(number).label}, ${phase}${moved ? `, moved here from row ${moved[0]}` : ""}${gone}. `
      + `${step.rows.length} rows, ${step.wait} waiting, ${(step.d * 1e3).toFixed(1)} ms. ${id}`;
  }

  /* ---- one picture ------------------------------------------------------------------------------------------- */

  #layout() {
    const { steps, dropped } = this.history;
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    const plot = width - GUTTER - 4;
    const pace = Math.min(Math.max(this.history.rate * 5, 60), plot / 2); // five seconds, cells of two pixels at least
    if (this.zoom) this.columns = Math.min(this.zoom, plot);
    else if (Math.abs(pace - this.columns) > 0.35 * this.columns) this.columns = Math.round(pace);
    const end = this.frozen === null ? steps.length : Math.min(Math.max(this.frozen - dropped, 0), steps.length);
    const first = Math.max(0, Math.floor(end - this.columns));
    const shown = steps.slice(first, end);
    const most = shown.reduce((top, step) => Math.max(top, step.rows.length, ...step.leave.map(([row]) => row + 1)), 0);
    const grid = height - 2 * (STRIP + GAP) - FOOT;
    const rows = Math.max(most, 8);
    return { width, height, first, shown, count: shown.length, wide: plot / this.columns, high: Math.min(grid / rows, 36), rows, grid };
  }

  #draw() {
    const { pen, canvas } = this;
    const scale = devicePixelRatio || 1;
    const view = (this.view = this.#layout());
    if (canvas.width !== Math.round(view.width * scale) || canvas.height !== Math.round(view.height * scale)) {
      canvas.width = Math.round(view.width * scale);
      canvas.height = Math.round(view.height * scale);
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = this.colors.card;
    pen.fillRect(0, 0, view.width, view.height);
    pen.font = `11px ${this.colors.font}`;
    this.#axes(view);
    this.#cells(view);
    this.#marks(view);
    strips(this, view);
    this.#cursor(view);
  }

  #axes({ width, high, rows }) {
    const { pen, colors } = this;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.max(1, Math.ceil(14 / high));
    for (let row = 0; row < rows; row++) {
      pen.fillStyle = colors.grid;
      pen.fillRect(GUTTER, row * high, width - GUTTER - 4, high - (high > 4 ? 1.5 : 0));
      pen.fillStyle = colors.quiet;
      if (row % every === 0) pen.fillText(String(row), GUTTER - 7, Math.max((row + 0.5) * high, 6));
    }
  }

  /* Runs of equal cells are one rectangle; labels where a request stays long enough. */
  #cells({ shown, wide, high, rows }) {
    const { pen, colors } = this;
    const body = high - (high > 4 ? 1.5 : 0), labels = [];
    for (let row = 0; row < rows; row++) {
      let from = 0, label = 0; // beginnings of the run, and of what its label may stand on
      for (let x = 1; x <= shown.length; x++) {
        const before = shown[x - 1], now = shown[x];
        const same = now && now.rows[row] === before.rows[row];
        if (same && now.kinds[row] === before.kinds[row]) continue;
        const number = before.rows[row];
        if (number !== undefined) {
          this.#run(this.history.look(number), before.kinds[row], GUTTER + from * wide, row * high, (x - from) * wide, body);
          if (!same && high >= 13) labels.push([number, label, x, row]);
        }
        from = x;
        if (!same || before.kinds[row] === 1) label = x; // not on the hatching
      }
    }
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.font = `600 11px ${colors.font}`;
    pen.fillStyle = "#10151c";
    for (const [number, from, to, row] of labels) {
      const { label } = this.history.look(number);
      const room = (to - from) * wide - 16;
      if (pen.measureText(label).width < room) pen.fillText(label, GUTTER + from * wide + 12, row * high + body / 2 + 0.5);
    }
    pen.font = `11px ${colors.font}`;
  }

  #run(look, kind, x, y, width, height) {
    const { pen } = this;
    if (kind === 1) {
      if (!this.dark.has(look.color)) this.dark.set(look.color, darker(look.color));
      pen.fillStyle = this.dark.get(look.color);
    } else pen.fillStyle = kind === 3 ? "#a9a49e" : look.color;
    pen.globalAlpha = (kind === 2 ? 0.35 : 1) * (this.only && look.label !== this.only ? 0.18 : 1);
    pen.fillRect(x, y, width + 0.3, height);
    if (kind === 1 && width >= 3) {
      pen.fillStyle = this.hatch;
      pen.fillRect(x, y, width + 0.3, height);
    }
    pen.globalAlpha = 1;
  }

  #marks({ shown, wide, high, grid }) {
    const { pen, colors } = this;
    const sparse = high > 8;
    const size = Math.max(2, Math.min(5, wide * 0.8 + 2, high * 0.3));
    shown.forEach((step, i) => {
      const x = GUTTER + i * wide;
      const pause = i ? step.t - shown[i - 1].t - shown[i - 1].d : 0;
      if (pause > 0.5) pauseMark(this, x, grid, pause);
      pen.globalAlpha = sparse ? 1 : 0.3;
      for (const [from, to] of step.move) {
        const y = (to + 0.5) * high - 0.5;
        pen.strokeStyle = pen.fillStyle = colors.ink;
        pen.lineWidth = 1;
        pen.setLineDash([2, 2]);
        pen.beginPath();
        pen.moveTo(x, (from + 0.5) * high - 0.5);
        pen.lineTo(x + wide / 2, y);
        pen.stroke();
        pen.setLineDash([]);
        if (!sparse) continue;
        pen.beginPath();
        pen.arc(x + wide / 2, y, size * 0.6, 0, 7);
        pen.fill();
      }
      pen.globalAlpha = 1;
      for (const [row, , reason] of step.leave) leaveMark(this, x, row * high, high, size, reason);
      for (const [row] of sparse ? step.join : []) { // among thin rows the hatching says it
        const y = (row + 0.5) * high - 0.7;
        pen.beginPath();
        pen.moveTo(x + 1, y - size);
        pen.lineTo(x + 1 + size * 1.5, y);
        pen.lineTo(x + 1, y + size);
        pen.closePath();
        pen.fillStyle = "#fff";
        pen.fill();
        pen.strokeStyle = "#10151c";
        pen.lineWidth = 0.9;
        pen.stroke();
      }
    });
  }

  #cursor({ first, wide, high, count }) {
    if (!this.cell) return;
    const column = this.cell.place - this.history.dropped - first;
    if (column < 0 || column >= count) return;
    const { pen, colors } = this;
    pen.lineWidth = 2;
    pen.strokeStyle = colors.card;
    pen.strokeRect(GUTTER + column * wide - 2, this.cell.row * high - 1, wide + 4, high + 1);
    pen.strokeStyle = colors.ink;
    pen.strokeRect(GUTTER + column * wide - 0.5, this.cell.row * high + 0.5, wide + 1, high - 2);
  }
}
