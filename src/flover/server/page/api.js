/* Requests to the server this page came from, with the key of this tab. */

const NAME = "flover-key";
let memory = ""; // where a browser refuses storage

export function getKey() {
  try { return sessionStorage.getItem(NAME) ?? memory; } catch { return memory; }
}

export function setKey(key) {
  memory = key;
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch { /* kept in memory */ }
}

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/* A response with a good status; ApiError says what the server said. A 401 also asks the page for a key. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (response.ok) return response;
  let said = {};
  try { said = (await response.json()).error ?? {}; } catch { /* no JSON */ }
  if (response.status === 401) dispatchEvent(new CustomEvent("key-needed"));
  throw new ApiError(response.status, said.message ?? `HTTP ${response.status}`, said.code);
}

/* The JSON objects of server-sent events. An error event is thrown, and so is an end without [DONE]. */
export async function* events(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (done) throw new ApiError(0, "the connection was cut");
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(0, event.error.message, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
