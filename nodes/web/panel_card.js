// One backend in the panel: what it does and holds, and the buttons for it.
import { meshPicture } from "./mesh_picture.js";
import { ErrorBox, button, keepList, made, tell } from "./panel_elements.js";
import { askBackend, getLog } from "./panel_server.js";
import * as words from "./panel_words.js";

const NARROWEST = 200; // px
const PADDING = 10; // of a card, as backend_panel.css has it

export class BackendCard {
  /** `changed` is called after a button has done something. */
  constructor(name, changed) {
    this.name = name;
    this.changed = changed;
    this.chosen = null; // of the models: whose mesh groups the ranks
    this.request = null; // of a button of this card, while it is under way
    this.failed = null; // why the last one was refused
    this.picture = "";
    this.makeParts();
  }

  makeParts() {
    const title = made("h3", "pm-name", this.name);
    this.state = made("span", "pm-state");
    this.far = made("span", "pm-far");
    this.spoken = made("span", "pm-spoken");
    this.spoken.setAttribute("aria-live", "polite");
    this.bar = made("progress", "pm-progress");
    this.bar.setAttribute("aria-label", "How far the job is");
    [this.job, this.queue, this.cost, this.devices] = ["", "", "", "pm-devices"].map((name) => made("p", `pm-line ${name}`));
    this.uptime = made("p", "pm-line pm-faint");
    this.mesh = made("div", "pm-mesh");
    this.modelsTitle = made("h4", "pm-title");
    this.models = made("ul", "pm-models");
    this.makeBanners();
    this.makeButtons();
    this.makeLog();
    const line = made("p", "pm-line pm-what", this.state, this.far, this.spoken);
    const errors = [this.banner, this.error.root, this.failure.root];
    const shown = [...errors, this.job, this.queue, this.devices, this.mesh, this.modelsTitle, this.models, this.cost];
    this.root = made("section", "pm-card", made("header", "", title, line), this.bar, ...shown, this.uptime);
    this.root.append(this.buttons, this.question, this.logBox);
    this.root.setAttribute("aria-label", `Backend ${this.name}`);
  }

  makeBanners() {
    this.bannerText = made("span");
    this.restartAsked = button("Restart as asked", () => this.askFirst("restart as asked", this.restartAsked));
    this.banner = made("div", "pm-banner", this.bannerText, this.restartAsked);
    this.banner.setAttribute("role", "alert");
    this.error = new ErrorBox();
    this.failure = new ErrorBox(() => this.forgetFailure());
  }

  makeButtons() {
    this.restart = button("Restart", () => this.askFirst("restart", this.restart));
    this.stop = button("Stop", () => this.askFirst("stop", this.stop));
    this.free = button("Free models", () => this.ask("free"));
    this.showLog = button("Show log", () => this.toggleLog());
    this.showLog.setAttribute("aria-expanded", "false");
    this.buttons = made("div", "pm-buttons", this.restart, this.stop, this.free, this.showLog);
    this.questionText = made("p");
    this.yes = button("", () => this.ask(this.asked));
    this.no = button("Keep it running", () => this.closeQuestion());
    this.question = made("div", "pm-question", this.questionText, made("div", "pm-buttons", this.yes, this.no));
    this.question.hidden = true;
    this.question.setAttribute("role", "alertdialog");
    this.question.setAttribute("aria-label", "What would be lost");
    this.question.addEventListener("keydown", (event) => event.key === "Escape" && this.closeQuestion());
  }

  makeLog() {
    this.log = made("pre", "pm-log");
    this.log.tabIndex = 0;
    this.log.setAttribute("aria-label", `Log of backend ${this.name}`);
    this.logBox = made("div", "", this.log);
    this.logBox.hidden = true;
  }

  /** Shows what the server tells of it; `client` is what this ComfyUI is called there. */
  update(entry, client) {
    this.entry = entry;
    this.client = client;
    const state = words.stateOf(entry);
    this.root.dataset.state = state.kind;
    tell(this.state, state.what);
    tell(this.far, state.far);
    tell(this.spoken, state.what);
    this.bar.hidden = state.part == null;
    this.bar.value = state.part ?? 0;
    tell(this.job, words.jobLine(entry.job, client));
    tell(this.queue, words.queueLine(entry, client));
    tell(this.cost, words.costLine(entry.last));
    tell(this.uptime, words.uptimeLine(entry));
    tell(this.devices, words.devicesLine(entry.ranks ?? []));
    tell(this.bannerText, words.refusalLine(entry.refusal));
    this.banner.hidden = !entry.refusal?.length;
    this.error.show(entry.error);
    this.failure.show(this.failed);
    this.showModels(entry.models ?? []);
    this.draw();
    this.enable();
  }

  enable() {
    const isBusy = Boolean(this.request || this.entry.doing);
    const isThere = !["starting", "gone"].includes(this.entry.phase);
    for (const one of [this.restart, this.stop, this.restartAsked, this.yes]) one.disabled = isBusy || !isThere;
    this.free.disabled = isBusy || !this.entry.models?.length;
    this.root.setAttribute("aria-busy", String(isBusy));
  }

  forgetFailure() {
    this.failed = null;
    this.failure.show(null);
    this.changed();
  }

  showModels(models) {
    const latestFirst = [...models].reverse();
    const title = this.entry.models ? (models.length ? `Models held: ${models.length}` : "No models held") : "";
    tell(this.modelsTitle, title);
    const make = (model) => {
      const name = button(model.name, () => this.choose(model.model));
      name.classList.add("pm-model");
      return made("li", "", name, made("p", "pm-line pm-faint"));
    };
    this.models.hidden = !models.length;
    keepList(this.models, latestFirst, (model) => model.model, make, (element, model) => {
      const [name, line] = element.children;
      tell(line, words.modelLine(model));
      name.title = "Group the ranks by this model's mesh";
      name.setAttribute("aria-pressed", String(model === this.groupedBy()));
    });
  }

  choose(model) {
    this.chosen = model;
    this.update(this.entry, this.client);
  }

  /** The model whose mesh groups the ranks: the one chosen, while it is held, else the last one used that has a mesh. */
  groupedBy() {
    const models = this.entry.models ?? [];
    const withMesh = models.filter((model) => Object.keys(model.axes ?? {}).length);
    return models.find((model) => model.model === this.chosen) ?? withMesh.at(-1);
  }

  /** The picture of the ranks, anew where anything in it is another. */
  draw() {
    const ranks = (this.entry.ranks ?? []).map(words.pictured);
    const axes = Object.entries(this.groupedBy()?.axes ?? {}).map(([name, size]) => ({ name, size }));
    const widest = Math.max(NARROWEST, this.root.clientWidth - 2 * PADDING);
    const picture = JSON.stringify([ranks, axes, widest]);
    if (picture === this.picture) return;
    this.picture = picture;
    this.mesh.hidden = !ranks.length;
    this.mesh.replaceChildren(...(ranks.length ? [meshPicture(ranks, axes, widest)] : []));
  }

  /** Asks once where others' work would end with it. */
  askFirst(what, opener) {
    const loss = words.lossOf(this.entry, this.client);
    if (!loss) {
      this.ask(what);
      return;
    }
    this.asked = what;
    this.opener = opener;
    tell(this.questionText, `${opener.textContent} ends ${loss}.`);
    tell(this.yes, `${opener === this.stop ? "Stop" : "Restart"} all the same`);
    this.question.hidden = false;
    this.no.focus();
  }

  closeQuestion() {
    if (this.question.hidden) return;
    this.question.hidden = true;
    this.opener.focus();
  }

  async ask(what) {
    this.question.hidden = true;
    this.failed = null;
    this.request = what;
    this.update({ ...this.entry, doing: this.entry.doing ?? { do: what } }, this.client);
    try {
      await askBackend(this.name, what);
    } catch (error) {
      this.failed = error;
    }
    this.request = null;
    this.update(this.entry, this.client);
    this.changed();
  }

  toggleLog() {
    this.logBox.hidden = !this.logBox.hidden;
    tell(this.showLog, this.logBox.hidden ? "Show log" : "Hide log");
    this.showLog.setAttribute("aria-expanded", String(!this.logBox.hidden));
    this.changed();
  }

  /** The log's last lines, where they are shown; it stays at its end unless it was scrolled away from there. */
  async followLog() {
    if (this.logBox.hidden) return;
    let told;
    try {
      told = (await getLog(this.name)).log;
    } catch (error) {
      told = error.message;
    }
    const isAtEnd = this.log.scrollTop + this.log.clientHeight >= this.log.scrollHeight - 4;
    if (this.log.textContent === told) return;
    this.log.textContent = told;
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}
