/* One prompt of the playground: its text, its request, its answers. */

import { events, getKey, request } from "./api.js";
import { owners } from "./history.js";

const PATHS = { chat: "/v1/chat/completions", completion: "/v1/completions" };

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export class Card {
  /* changed: called with words when a request begins or ends; removed: when the card shall go. */
  constructor(label, color, text, { changed, removed }) {
    Object.assign(this, { label, color, changed, stop: null });
    const button = (text, name, click) => {
      const made = make("button", { type: "button", textContent: text });
      made.setAttribute("aria-label", `${name} ${label}`);
      made.title = name;
      made.addEventListener("click", click);
      return made;
    };
    this.badge = button(label, "Show alone in the picture:", () => dispatchEvent(new CustomEvent("show-only", { detail: label })));
    this.badge.className = "badge";
    this.badge.setAttribute("aria-pressed", "false");
    this.status = make("span", { className: "status" });
    this.stopButton = button("Stop", "Stop", () => this.abort());
    this.stopButton.hidden = true;
    this.copyButton = button("curl", "Copy as curl", () => this.copy());
    this.removeButton = button("✕", "Remove", () => removed(this));
    this.prompt = make("textarea", { value: text, rows: 2, spellcheck: false });
    this.prompt.setAttribute("aria-label", `Prompt ${label}`);
    this.answers = make("div", { className: "answers" }, make("div"));
    this.answers.setAttribute("role", "group");
    this.answers.setAttribute("aria-label", `Answer ${label}`);
    const top = make("div", { className: "top" }, this.badge, this.status, this.stopButton, this.copyButton, this.removeButton);
    this.node = make("article", { className: "card" }, top, this.prompt, this.answers);
    this.node.setAttribute("aria-label", `Prompt ${label}`);
    this.node.style.setProperty("--hue", color);
  }

  get running() {
    return this.stop !== null;
  }

  body(mode, values) {
    const { system, ...sampling } = values;
    const content = { role: "user", content: this.prompt.value };
    const messages = system ? [{ role: "system", content: system }, content] : [content];
    const asked = mode === "chat" ? { messages } : { prompt: this.prompt.value };
    return { ...asked, ...sampling, stream: true, stream_options: { include_usage: true } };
  }

  abort() {
    this.stop?.abort();
  }

  async send(mode, values) {
    if (this.running || !this.prompt.value) return;
    const stop = (this.stop = new AbortController()), began = performance.now();
    const texts = Array.from({ length: values.n ?? 1 }, () => make("div"));
    this.answers.replaceChildren(...texts);
    this.answers.classList.toggle("many", texts.length > 1);
    for (const text of texts) text.tabIndex = 0; // they scroll
    this.#run(true, "waiting");
    let tokens = 0, first = 0, reason = "", shown = 0;
    try {
      const response = await request(PATHS[mode], { body: this.body(mode, values), signal: stop.signal });
      for await (const event of events(response)) {
        owners.set(event.id, { label: this.label, color: this.color });
        for (const choice of event.choices) {
          const piece = choice.text ?? choice.delta?.content ?? "";
          reason = choice.finish_reason ?? reason;
          if (!piece) continue;
          const now = performance.now();
          first ||= now;
          tokens += 1;
          const text = texts[choice.index], end = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
          text.append(text.hasChildNodes() ? piece : piece.trimStart());
          if (end) text.scrollTop = text.scrollHeight;
          if (now - shown > 200) {
            shown = now;
            this.status.textContent = `${tokens} tokens, ${this.#rate(tokens, first)}`;
          }
        }
        if (event.usage) tokens = event.usage.completion_tokens;
      }
      const ttft = first ? `, first after ${Math.round(first - began)} ms` : "";
      this.#run(false, `${reason || "ended"}: ${tokens} tokens in ${((performance.now() - began) / 1e3).toFixed(1)} s${ttft}`);
    } catch (error) {
      if (stop.signal.aborted) this.#run(false, `stopped after ${tokens} tokens`);
      else {
        this.#run(false, error.message);
        this.status.classList.add("error");
      }
    }
  }

  #rate(tokens, first) {
    const seconds = (performance.now() - first) / 1e3;
    return seconds > 0.2 ? `${Math.round(tokens / seconds)}/s` : "…";
  }

  #run(on, text) {
    if (!on) this.stop = null;
    this.node.classList.toggle("running", on);
    this.status.classList.remove("error");
    this.node.setAttribute("aria-busy", String(on));
    if (!on && document.activeElement === this.stopButton) this.prompt.focus(); // it goes, the focus stays here
    this.stopButton.hidden = !on;
    this.status.textContent = text;
    this.changed(`${this.label} ${text}`);
  }

  /* The request as a command; the key is not in it, but where it goes is. */
  curl(mode, values) {
    const quoted = JSON.stringify(this.body(mode, values)).replaceAll("'", "'\\''");
    const key = getKey() ? ' \\\n  -H "Authorization: Bearer $FLOVER_API_KEY"' : "";
    return `curl -N ${location.origin}${PATHS[mode]}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
  }

  async copy() {
    const text = this.curl(...this.settings());
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no secure context, or not allowed: the old way
      const area = make("textarea", { value: text });
      this.node.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    this.status.textContent = "copied";
    this.copyButton.focus();
  }
}
