/* The page: theme, key, and its two parts. */

import { getKey, request, setKey } from "./api.js";
import { Live } from "./live.js";
import { Playground } from "./playground.js";

const $ = (id) => document.getElementById(id);
const live = new Live();
new Playground();

/* theme: the system's, or what was chosen here */
{
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const apply = () => {
    $("theme").textContent = now() === "dark" ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `${$("theme").textContent} colours`);
    live.fusion.restyle();
  };
  try {
    const kept = localStorage.getItem("flover-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* not kept */ }
  $("theme").addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    try { localStorage.setItem("flover-theme", root.dataset.theme); } catch { /* not kept */ }
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

/* key: asked for when the server wants one */
{
  const dialog = $("key-dialog"), field = $("key-value"), error = $("key-error");
  const open = (wanted) => {
    if (dialog.open) return;
    $("key-text").textContent = wanted ? "This server wants a key." : "It is sent with every request of this page.";
    error.hidden = true;
    field.value = "";
    $("key-forget").hidden = !getKey();
    dialog.showModal();
    field.focus();
  };
  addEventListener("key-needed", () => open(true));
  $("key").addEventListener("click", () => open(false));
  $("key-cancel").addEventListener("click", () => dialog.close());
  $("key-forget").addEventListener("click", () => {
    setKey("");
    dialog.close();
    live.connect();
  });
  $("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const before = getKey();
    setKey(field.value.trim());
    try {
      await request("/v1/models");
      dialog.close();
      live.connect();
    } catch (problem) {
      setKey(before);
      error.textContent = problem.status === 401 ? "The server does not accept this key." : problem.message;
      error.hidden = false;
      field.select();
    }
  });
}

live.connect();
