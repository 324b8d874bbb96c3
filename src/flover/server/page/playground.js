/* The cards, their parameters, and what runs all of them. */

import { Card } from "./card.js";
import { PALETTE } from "./history.js";

const $ = (id) => document.getElementById(id);
const MAX_CARDS = 5; // a browser has six connections to a server, and the live view is one
const EXAMPLES = {
  completion: ["In the beginning", "And Moses said unto the people,", "Blessed are they that", "The king of Babylon", "Hear, O Israel:"],
  chat: ["Who was Moses?", "Tell me of the flood.", "What did the king say?", "Where is wisdom found?", "Sing me a song."],
};
const narrow = matchMedia("(max-width: 40rem)");

export class Playground {
  constructor() {
    this.cards = [];
    for (let i = 0; i < (narrow.matches ? 2 : 4); i++) this.add();
    $("add").addEventListener("click", () => this.add()?.prompt.focus());
    $("send").addEventListener("click", () => this.send());
    $("stop").addEventListener("click", () => this.stop());
    $("values").addEventListener("submit", (event) => event.preventDefault());
    for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", () => this.#mode());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.send();
      } else if (event.key === "Escape" && !$("key-dialog").open) this.stop();
    });
    if (narrow.matches) $("parameters").open = false;
    this.#mode();
    this.#changed();
  }

  get mode() {
    return document.querySelector("input[name=mode]:checked").value;
  }

  add() {
    if (this.cards.length >= MAX_CARDS) return null;
    const used = new Set(this.cards.map((card) => card.label));
    const place = [..."ABCDE"].findIndex((label) => !used.has(label));
    const card = new Card("ABCDE"[place], PALETTE[place], EXAMPLES[this.mode][place], {
      changed: (words) => this.#changed(words),
      removed: (gone) => this.#remove(gone),
    });
    card.place = place;
    card.settings = () => [this.mode, this.values()];
    this.cards.push(card);
    $("cards").append(card.node);
    this.#changed();
    return card;
  }

  /* The parameters that are set, by the API's names; what is empty stays the server's default. */
  values() {
    const values = {};
    for (const field of $("values").elements) {
      if (!field.name || (field.name === "system" && this.mode !== "chat")) continue;
      if (field.type === "checkbox") {
        if (field.checked) values[field.name] = true;
      } else if (field.value !== "") values[field.name] = field.type === "number" ? Number(field.value) : field.value;
    }
    if (values.n === 1) delete values.n;
    return values;
  }

  send() {
    $("notice").hidden = true;
    if (!$("values").checkValidity()) {
      $("parameters").open = true;
      $("values").reportValidity();
      return;
    }
    const ready = this.cards.filter((card) => !card.running && card.prompt.value);
    if (!ready.length && !this.cards.some((card) => card.running)) this.notice("There is no prompt to send.");
    const values = this.values();
    for (const card of ready) card.send(this.mode, values);
  }

  stop() {
    for (const card of this.cards) card.abort();
  }

  notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = false;
  }

  #remove(card) {
    card.abort();
    if (card.badge.getAttribute("aria-pressed") === "true") card.badge.click(); // it pales nobody any more
    const place = this.cards.indexOf(card);
    this.cards.splice(place, 1);
    card.node.remove();
    this.#changed();
    (this.cards[Math.min(place, this.cards.length - 1)]?.prompt ?? $("add")).focus();
  }

  /* Examples that nobody has changed follow the endpoint. */
  #mode() {
    const mode = this.mode, other = mode === "chat" ? "completion" : "chat";
    $("system-field").hidden = mode !== "chat";
    for (const card of this.cards) {
      if (card.prompt.value === EXAMPLES[other][card.place]) card.prompt.value = EXAMPLES[mode][card.place];
    }
  }

  #changed(words = "") {
    $("said").textContent = words;
    const running = this.cards.filter((card) => card.running).length;
    const off = (id, no) => $(id).setAttribute("aria-disabled", String(no)); // a disabled button would lose the focus
    off("stop", running === 0);
    off("send", running === this.cards.length);
    off("add", this.cards.length >= MAX_CARDS);
    for (const card of this.cards) card.removeButton.hidden = this.cards.length === 1;
  }
}
