/* What is painted around the cells: colours, marks, strips. */

export const GUTTER = 34, STRIP = 34, GAP = 10, FOOT = 16; // pixels

/* Colours of the page, as they are now. */
export function theme() {
  const style = getComputedStyle(document.body);
  const probe = document.createElement("i"); // light-dark() is only resolved where it is used
  document.body.append(probe);
  const color = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const found = Object.fromEntries(["card", "ink", "quiet", "line", "plain", "pale", "grid", "accent"].map((n) => [n, color(n)]));
  probe.remove();
  return { ...found, font: style.fontFamily || "sans-serif" };
}

export function darker(hex) {
  const part = (i) => Math.round(parseInt(hex.slice(i, i + 2), 16) * 0.58);
  return `rgb(${part(1)}, ${part(3)}, ${part(5)})`;
}

/* The mark of an end, by its reason, between two columns. */
export function leaveMark({ pen, colors }, x, top, high, size, reason) {
  const y = top + high / 2 - 0.7;
  pen.fillStyle = pen.strokeStyle = colors.ink;
  pen.lineWidth = 2;
  pen.beginPath();
  if (reason === "abort" || reason === "error") {
    pen.moveTo(x - size, y - size);
    pen.lineTo(x + size, y + size);
    pen.moveTo(x - size, y + size);
    pen.lineTo(x + size, y - size);
    pen.stroke();
  } else if (reason === "preempted") {
    pen.moveTo(x - size, y - size);
    pen.lineTo(x + size, y - size);
    pen.lineTo(x, y + size);
    pen.fill();
  } else pen.fillRect(x - 1.25, top + 0.5, 2.5, Math.max(high - 2.5, 2));
}

/* Nothing ran for so long. */
export function pauseMark({ pen, colors }, x, grid, seconds) {
  pen.strokeStyle = colors.quiet;
  pen.lineWidth = 1;
  pen.setLineDash([3, 3]);
  pen.beginPath();
  pen.moveTo(x, 0);
  pen.lineTo(x, grid);
  pen.stroke();
  pen.setLineDash([]);
  pen.fillStyle = colors.quiet;
  pen.textAlign = x > 60 + GUTTER ? "right" : "left";
  pen.fillText(`idle ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`, x + (x > 60 + GUTTER ? -4 : 4), grid - 7);
}

/* Text that stays readable over an area. */
function caption({ pen, colors }, text, x, y) {
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.lineWidth = 3;
  pen.lineJoin = "round";
  pen.strokeStyle = colors.card;
  pen.strokeText(text, x, y);
  pen.fillStyle = colors.ink;
  pen.fillText(text, x, y);
}

/* Requests and KV memory, below the grid and on its axis. */
export function strips(fusion, { width, height, shown, wide, grid }) {
  const { pen, colors, kvBytes } = fusion;
  const top = grid + GAP, low = top + STRIP + GAP;
  const requests = Math.max(4, ...shown.map((step) => step.rows.length + step.wait));
  const memory = Math.max(1, ...shown.map((step) => step.kv));
  const area = (value, most, base, color) => {
    pen.fillStyle = color;
    pen.beginPath();
    pen.moveTo(GUTTER, base);
    shown.forEach((step, i) => {
      const y = base - (value(step) / most) * STRIP;
      pen.lineTo(GUTTER + i * wide, y);
      pen.lineTo(GUTTER + (i + 1) * wide, y);
    });
    pen.lineTo(GUTTER + shown.length * wide, base);
    pen.fill();
  };
  area((step) => step.rows.length + step.wait, requests, top + STRIP, colors.pale);
  area((step) => step.rows.length, requests, top + STRIP, colors.plain);
  area((step) => step.kv, memory, low + STRIP, colors.plain);
  pen.strokeStyle = colors.line;
  pen.lineWidth = 1;
  for (const y of [top + STRIP + 0.5, low + STRIP + 0.5]) {
    pen.beginPath();
    pen.moveTo(GUTTER, y);
    pen.lineTo(width - 4, y);
    pen.stroke();
  }
  const share = kvBytes ? ` (top: ${((100 * memory) / kvBytes).toFixed(memory < kvBytes / 20 ? 1 : 0)} % of the cache)` : "";
  caption(fusion, "running, and waiting on top", GUTTER + 5, top + 7);
  caption(fusion, `KV memory${shown.length ? share : ""}`, GUTTER + 5, low + 7);
  pen.fillStyle = colors.quiet;
  pen.textAlign = "right";
  if (shown.length) pen.fillText(String(requests), GUTTER - 7, top + 6);
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  if (!shown.length) return;
  pen.fillText(`step ${shown[0].n}`, GUTTER, height - 2);
  pen.textAlign = "right";
  if (shown.length * wide > 150) pen.fillText(String(shown[shown.length - 1].n), GUTTER + shown.length * wide, height - 2);
}
