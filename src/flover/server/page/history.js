/* What the batch did lately: steps with their rows, and what is known of each request. No drawing. */

export const PALETTE = ["#5b8fd9", "#e08a3c", "#4fae8a", "#c96fa8", "#b5a339", "#7f78d2", "#d9695f", "#4ba7c4", "#8aa84a", "#a87b5b", "#d487c9", "#6f9a9c"];
const MAX_STEPS = 4000, WINDOW = 10; // steps kept; seconds of latencies
const NOTHING = [];

/* Requests that this page has sent, by the id of their answer: { label, color }. */
export const owners = new Map();

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    this.steps = [];
    this.dropped = 0; // of the front, so that a step's place + dropped stays
    this.requests = new Map(); // number -> { id, first, prefill, decode }
    this.samples = [];
    this.rows = NOTHING;
    this.lost = 0;
  }

  /* An event of /live. */
  add(event, now) {
    for (const [number, id] of Object.entries(event.names)) this.requests.set(Number(number), { id, steps: 0 });
    for (const step of event.steps) this.#step(step);
    if (this.steps.length > MAX_STEPS) {
      const over = this.steps.length - MAX_STEPS;
      this.steps.splice(0, over);
      this.dropped += over;
    }
    if (this.requests.size > 4 * MAX_STEPS) this.#forget();
    this.lost += event.lost;
    this.samples.push({ at: now, tokens: event.tokens, ttft: event.ttft, itl: event.itl });
    while (this.samples.length && this.samples[0].at < now - WINDOW) this.samples.shift();
  }

  #step(step) {
    if (step.rows) this.rows = step.rows;
    const kinds = new Uint8Array(this.rows.length); // 0 decode, 1 prefill, 2 no token, 3 dead
    for (const [row] of step.pre ?? NOTHING) kinds[row] = 1;
    for (const row of step.idle ?? NOTHING) kinds[row] = 2;
    for (const row of step.dead ?? NOTHING) kinds[row] = 3;
    for (const number of this.rows) {
      const request = this.requests.get(number);
      if (request) request.steps += 1;
    }
    this.steps.push({ n: step.n, t: step.t, d: step.d, wait: step.wait, kv: step.kv, rows: this.rows, kinds, pre: step.pre ?? NOTHING,
      join: step.join ?? NOTHING, leave: step.leave ?? NOTHING, move: step.move ?? NOTHING });
  }

  #forget() {
    const seen = new Set(this.steps.flatMap((step) => [...step.rows, ...step.leave.map(([, number]) => number)]));
    for (const number of this.requests.keys()) if (!seen.has(number)) this.requests.delete(number);
  }

  get last() {
    return this.steps[this.steps.length - 1];
  }

  /* Steps a second over the last two seconds that had any. */
  get rate() {
    const end = this.last;
    if (!end) return 0;
    let count = 0;
    for (let i = this.steps.length - 1; i >= 0 && this.steps[i].t > end.t - 2; i--) count++;
    return count / 2;
  }

  /* Tokens a second over the last `seconds`. */
  tokens(now, seconds = 3) {
    let sum = 0;
    for (const sample of this.samples) if (sample.at > now - seconds) sum += sample.tokens;
    return sum / seconds;
  }

  /* [p50, p99] in milliseconds, or null; buckets per doubling. */
  percentiles(name, buckets) {
    const counts = new Map();
    let total = 0;
    for (const sample of this.samples) {
      for (const [bucket, count] of Object.entries(sample[name])) {
        counts.set(Number(bucket), (counts.get(Number(bucket)) ?? 0) + count);
        total += count;
      }
    }
    if (!total) return null;
    const order = [...counts.keys()].sort((a, b) => a - b);
    return [0.5, 0.99].map((share) => {
      let seen = 0;
      for (const bucket of order) {
        seen += counts.get(bucket);
        if (seen >= share * total) return 2 ** (bucket / buckets);
      }
      return 2 ** (order[order.length - 1] / buckets);
    });
  }

  /* Label and colour of a request. Own ones have their card's, others a number. */
  look(number) {
    const id = this.requests.get(number)?.id ?? "";
    const own = owners.get(id.split("-").slice(0, 2).join("-"));
    return own ?? { label: `#${number}`, color: PALETTE[number % PALETTE.length] };
  }
}
