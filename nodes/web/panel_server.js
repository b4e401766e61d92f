// What the backend panel asks ComfyUI's server, and how often.
import { api } from "/scripts/api.js";

const EVERY_MS = 1000;
const LONGEST_PAUSE_MS = 30000;

/** The answer's JSON. Throws {message, remedy, details}: what the server refuses it with, or that it doesn't answer. */
async function answerOf(path, options) {
  let answer;
  try {
    answer = await api.fetchApi(path, options);
  } catch (error) {
    throw { message: `ComfyUI's server does not answer (${error.message}).`, remedy: "It is asked again by itself." };
  }
  const told = await answer.json().catch(() => ({}));
  if (answer.ok) return told;
  throw told.error ?? { message: `ComfyUI's server answered ${answer.status} to ${path}.`, remedy: "" };
}

function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return answerOf(path, { method: "POST", headers, body: JSON.stringify(body) });
}

export const getStatus = () => answerOf("/parallel_mmdit/status");
export const getLog = (name) => answerOf(`/parallel_mmdit/log?name=${encodeURIComponent(name)}`);
export const askBackend = (name, what) => post("/parallel_mmdit/backend", { name, do: what });
export const askDoctor = () => post("/parallel_mmdit/doctor", {});

/** Calls `ask` once a second while `element` is seen, never twice at a time; less and less often while it fails. */
export class Polling {
  constructor(element, ask) {
    this.ask = ask;
    this.isInView = false;
    this.timer = null;
    this.isAsking = false;
    this.askAgain = false;
    this.pause = EVERY_MS;
    document.addEventListener("visibilitychange", () => this.begin());
    new IntersectionObserver((changes) => {
      this.isInView = changes.at(-1).isIntersecting;
      this.begin();
    }).observe(element);
  }

  /** Asks now, or as soon as the request that is under way is answered; not at all while nobody sees it. */
  begin() {
    clearTimeout(this.timer);
    this.askAgain = this.isAsking;
    if (!this.isAsking) this.once();
  }

  async once() {
    if (!this.isInView || document.visibilityState !== "visible") return;
    this.isAsking = true;
    try {
      await this.ask();
      this.pause = EVERY_MS;
    } catch {
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE_MS);
    }
    this.isAsking = false;
    this.timer = setTimeout(() => this.once(), this.askAgain ? 0 : this.pause);
    this.askAgain = false;
  }
}
