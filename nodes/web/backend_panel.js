// The backends of this machine in the editor's sidebar: what they do and hold, live while it is seen, and buttons for them.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { BackendCard } from "./panel_card.js";
import { ErrorBox, button, keepList, made, tell } from "./panel_elements.js";
import { Polling, askBackend, askDoctor, getStatus } from "./panel_server.js";
import { count } from "./panel_words.js";

const TAB = "parallel-mmdit-backends";
const TITLE = "Parallel MMDiT";

class BackendPanel {
  constructor() {
    this.cards = new Map();
    this.makeParts();
    this.polling = new Polling(this.root, () => this.ask());
  }

  makeParts() {
    this.lost = new ErrorBox();
    this.list = made("div", "pm-cards");
    this.none = made("p", "pm-line");
    this.startButton = button("Start", () => this.start());
    this.startFailed = new ErrorBox();
    const startLine = made("div", "pm-buttons", this.startButton);
    this.startBox = made("section", "pm-card", this.none, startLine, this.startFailed.root);
    this.startBox.hidden = true;
    this.startBox.setAttribute("aria-label", "Start a backend");
    this.makeDoctor();
    this.root = made("div", "pm-panel", made("h2", "pm-heading", TITLE), this.lost.root, this.list);
    this.root.append(this.startBox, this.doctorBox);
  }

  makeDoctor() {
    this.doctorButton = button("Copy doctor's page", () => this.copyDoctor());
    this.doctorSays = made("p", "pm-line");
    this.doctorSays.setAttribute("aria-live", "polite");
    this.doctorPage = made("textarea", "pm-log");
    this.doctorPage.readOnly = true;
    this.doctorPage.hidden = true;
    this.doctorPage.setAttribute("aria-label", "The doctor's page");
    this.doctorBox = made("section", "pm-doctor", this.doctorButton, this.doctorSays, this.doctorPage);
  }

  async ask() {
    try {
      this.show(await getStatus());
      this.lost.show(null);
    } catch (error) {
      this.lost.show(error);
      throw error;
    }
    for (const card of this.cards.values()) await card.followLog();
  }

  show({ backends, default: first, client = "" }) {
    const make = (entry) => {
      const card = new BackendCard(entry.name, () => this.polling.begin());
      this.cards.set(entry.name, card);
      return card.root;
    };
    const names = backends.map((entry) => entry.name);
    // Why a backend is gone that was to be restarted, or would not end, stays to be read.
    const gone = [...this.cards.values()].filter((card) => card.failed && !names.includes(card.name));
    const shown = [...backends, ...gone.map((card) => ({ name: card.name, phase: "gone" }))];
    keepList(this.list, shown, (entry) => entry.name, make, (_, entry) => this.cards.get(entry.name).update(entry, client));
    for (const name of this.cards.keys()) if (!shown.some((entry) => entry.name === name)) this.cards.delete(name);
    this.showStart(names, first);
  }

  /** Start is there where the backend of Mesh Config's defaults isn't. */
  showStart(names, first) {
    this.first = first?.name;
    this.startBox.hidden = !this.first || names.includes(this.first);
    const other = names.length ? `Backend ${this.first} does not run.` : "No backend runs.";
    tell(this.none, `${other} The first prompt starts it, or you do now: ${count(first?.ranks ?? 0, "rank")} on ${first?.device}.`);
    this.startButton.disabled = Boolean(this.isStarting);
  }

  async start() {
    this.isStarting = true;
    this.startButton.disabled = true;
    this.startFailed.show(null);
    const asked = askBackend(this.first, "start");
    this.polling.begin();
    try {
      await asked;
    } catch (error) {
      this.startFailed.show(error);
    }
    this.isStarting = false;
    this.polling.begin();
  }

  async copyDoctor() {
    this.doctorButton.disabled = true;
    this.doctorBox.setAttribute("aria-busy", "true");
    tell(this.doctorSays, "It looks, and starts ranks for a moment to prove their links …");
    try {
      const page = (await askDoctor()).page;
      this.doctorPage.value = page;
      await this.copy(page);
    } catch (error) {
      tell(this.doctorSays, [error.message, error.remedy].filter(Boolean).join(" "));
    }
    this.doctorBox.removeAttribute("aria-busy");
    this.doctorButton.disabled = false;
  }

  /** Into the clipboard; where that can't be had, the page is shown to be copied by hand. */
  async copy(page) {
    const [sum] = page.split(/[;\n]/, 1);
    try {
      await navigator.clipboard.writeText(page);
      this.doctorPage.hidden = true;
      tell(this.doctorSays, `Copied: ${sum}.`);
    } catch {
      this.doctorPage.hidden = false;
      this.doctorPage.select();
      tell(this.doctorSays, `Here it is, to be copied: ${sum}.`);
    }
  }
}

function addStyle() {
  const link = made("link");
  link.rel = "stylesheet";
  link.href = new URL("./backend_panel.css", import.meta.url).href;
  document.head.append(link);
}

/** Opens the panel; where the editor has no way to, a message says where it is. */
function openPanel() {
  const tabs = app.extensionManager.sidebarTab;
  if (tabs?.toggleSidebarTab && "activeSidebarTabId" in tabs) {
    if (tabs.activeSidebarTabId !== TAB) tabs.toggleSidebarTab(TAB);
    return;
  }
  const detail = `The backend is in use. Open ${TITLE} in the sidebar to restart it as asked.`;
  app.extensionManager.toast?.add({ severity: "warn", summary: TITLE, detail, life: 20000 });
}

function isInUse({ detail }) {
  return detail?.exception_type?.endsWith("BackendInUseError");
}

app.registerExtension({
  name: "ParallelMMDiT.BackendPanel",
  setup() {
    if (!app.extensionManager?.registerSidebarTab) return; // an editor without a sidebar
    addStyle();
    const panel = new BackendPanel();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-server",
      title: TITLE,
      tooltip: `${TITLE}: backends, their ranks, models and jobs`,
      type: "custom",
      render(element) {
        if (panel.root.parentElement === element) return; // drawn again
        element.style.height = "100%";
        element.append(panel.root);
      },
    });
    api.addEventListener("execution_error", (event) => {
      if (!isInUse(event)) return;
      openPanel();
      panel.polling.begin();
    });
  },
});
