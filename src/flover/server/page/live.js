/* Follows /live while the page is seen: numbers, picture, and the table of who runs. */

import { events, request } from "./api.js";
import { Fusion } from "./fusion.js";
import { History } from "./history.js";

const $ = (id) => document.getElementById(id);
const STATES = { ready: "ready", "engine dead": "engine dead", "engine stalled": "engine stalled", draining: "draining", down: "no answer", busy: "too many watch", key: "needs a key", connecting: "connecting" };
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Live {
  constructor() {
    this.history = new History();
    this.fusion = new Fusion($("fusion"), this.history);
    this.hello = { buckets: 8, max_num_seqs: 0, kv_bytes: 0 };
    this.now = { running: 0, waiting: 0, kv_usage: 0 };
    this.drawn = 0;
    this.told = 0;
    this.wait = 0;
    this.#controls();
    setInterval(() => this.#numbers(), 250);
    document.addEventListener("visibilitychange", () => this.connect());
  }

  /* Begin anew, with the key of now; not while nobody sees it. */
  async connect() {
    this.stop?.abort();
    clearTimeout(this.wait);
    if (document.hidden) return;
    const stop = (this.stop = new AbortController());
    let state = "down";
    try {
      const response = await request("/live", { signal: stop.signal });
      for await (const event of events(response)) this.#take(event);
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.status === 401) {
        this.#state("key"); // whoever gets a key connects again
        return;
      }
      if (error.status === 429) state = "busy";
    }
    if (stop.signal.aborted) return;
    this.#state(state);
    this.wait = setTimeout(() => this.connect(), state === "busy" ? 5000 : 1000);
  }

  #take(event) {
    if (event.hello) {
      this.hello = event.hello;
      this.fusion.kvBytes = event.hello.kv_bytes;
      this.history.clear();
      $("model").textContent = event.hello.model;
      $("t-rows").textContent = `of ${event.hello.max_num_seqs} rows`;
      this.#state("ready");
      return;
    }
    const now = performance.now() / 1e3;
    this.history.add(event, now);
    this.now = event;
    this.#state(event.state);
    if (event.steps.length && (!calm.matches || now - this.drawn > 1)) {
      this.drawn = now;
      if (this.fusion.frozen === null) this.fusion.redraw();
    }
    $("empty").hidden = this.history.steps.length > 0;
  }

  #state(name) {
    const state = $("state");
    if (state.textContent !== STATES[name]) state.textContent = STATES[name];
    state.className = `state ${name.replace(" ", "-")}`;
  }

  #numbers() {
    const now = performance.now() / 1e3, { history } = this;
    const pair = (name) => {
      const found = history.percentiles(name, this.hello.buckets);
      return found ? found.map((ms) => (ms < 9.95 ? ms.toFixed(1) : Math.round(ms))).join(" · ") : "–";
    };
    const usage = 100 * this.now.kv_usage;
    $("t-running").textContent = this.now.running;
    $("t-waiting").textContent = this.now.waiting;
    $("t-rate").textContent = Math.round(history.tokens(now));
    $("t-ttft").textContent = pair("ttft");
    $("t-itl").textContent = pair("itl");
    $("t-kv").textContent = `${usage && usage < 10 ? usage.toFixed(1) : Math.round(usage)} %`;
    $("t-kv-bytes").textContent = this.hello.kv_bytes ? `of ${(this.hello.kv_bytes / 2 ** 20).toFixed(0)} MiB` : "";
    if (calm.matches && this.fusion.frozen === null) this.fusion.redraw();
    if ($("who").open && now - this.told > 1) {
      this.told = now;
      this.#who();
    }
  }

  /* The table, for those who do not see the picture. */
  #who() {
    const step = this.history.last, running = this.now.running > 0 && step ? step.rows : [];
    const rows = running.map((number, row) => {
      const entry = this.history.requests.get(number);
      const line = document.createElement("tr");
      const phase = ["decode", "prefill", "no token", "dead"][step.kinds[row]];
      for (const text of [row, `${this.history.look(number).label} ${entry?.id ?? ""}`, phase, entry?.steps ?? ""]) {
        line.insertCell().textContent = text;
      }
      return line;
    });
    if (!rows.length) {
      const line = document.createElement("tr");
      const cell = line.insertCell();
      cell.colSpan = 4;
      cell.textContent = "Nothing runs.";
      rows.push(line);
    }
    $("who-rows").replaceChildren(...rows);
  }

  #controls() {
    const { fusion } = this, canvas = $("fusion"), button = $("pause");
    const pause = (on) => {
      fusion.pause(on);
      button.setAttribute("aria-pressed", String(on));
      button.textContent = on ? "Go on" : "Pause";
    };
    const tell = () => { $("probe").textContent = fusion.words() || "Point, tap or use the arrow keys to look at a cell."; };
    button.addEventListener("click", () => pause(fusion.frozen === null));
    $("zoom").addEventListener("change", (event) => {
      fusion.zoom = Number(event.target.value);
      fusion.redraw();
    });
    canvas.addEventListener("pointermove", (event) => {
      fusion.cell = fusion.at(event.clientX, event.clientY);
      fusion.redraw();
      tell();
    });
    canvas.addEventListener("pointerdown", (event) => {
      fusion.cell = fusion.at(event.clientX, event.clientY);
      fusion.redraw();
      tell();
    });
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return; // what was tapped stays
      fusion.cell = null;
      fusion.redraw();
      tell();
    });
    addEventListener("show-only", ({ detail }) => { // again: all of them
      fusion.only = fusion.only === detail ? "" : detail;
      for (const badge of document.querySelectorAll(".badge")) badge.setAttribute("aria-pressed", String(badge.textContent === fusion.only));
      fusion.redraw();
    });
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [-20, 0], PageDown: [20, 0] };
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        fusion.cell = null;
        pause(false);
      } else if (moves[event.key]) {
        if (fusion.frozen === null) pause(true); // a cell that runs away cannot be read
        fusion.step(...moves[event.key]);
      } else return;
      event.preventDefault();
      event.stopPropagation();
      tell();
    });
  }
}
