// Mesh Config: a picture of the mesh below its inputs, and values of older workflow files at their new places.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { advancedButtons, fit, foldAdvanced } from "./advanced_inputs.js";
import { meshPicture } from "./mesh_picture.js";
import { inOrderOf, isOfFirstOrder, sayOrder, valued } from "./mesh_values.js";

const NODE = "MeshConfig";
const PICTURE = "mesh_picture";
const WAIT = 150; // ms after the last change
const KINDS = { mmdit: "SD3 (MMDiT)", unet: "SDXL (UNet)" };
const STYLE =
  "display: flex; flex-direction: column; gap: 4px; font: 11px/1.35 sans-serif; color: var(--input-text, #ddd);" +
  " overflow-wrap: anywhere;";

function after(original, more) {
  return function (...given) {
    const answer = original?.apply(this, given);
    more.apply(this, given);
    return answer;
  };
}

app.registerExtension({
  name: "ParallelMMDiT.MeshConfig",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const node = nodeType.prototype;
    const { configure } = node;
    node.configure = function (saved) {
      const answer = configure.call(this, inOrderOf(this, saved));
      if (isOfFirstOrder(saved)) fit(this); // saved with all its inputs in sight
      return answer;
    };
    node.onSerialize = after(node.onSerialize, function (saved) {
      sayOrder(this, saved);
    });
    node.onNodeCreated = after(node.onNodeCreated, addPicture);
    node.onAdded = after(node.onAdded, redraw);
    node.onConfigure = after(node.onConfigure, redraw);
    node.onConnectionsChange = after(node.onConnectionsChange, redraw);
    node.onRemoved = after(node.onRemoved, forget);
  },
});

function addPicture() {
  const place = document.createElement("div");
  const shown = document.createElement("div");
  shown.style.cssText = STYLE;
  place.append(shown);
  const picture = { shown, height: 0, timer: 0, asked: 0 };
  const height = () => picture.height;
  const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height };
  picture.widget = this.addDOMWidget(PICTURE, PICTURE, place, options);
  picture.widget.serialize = false; // which lists of values go by
  picture.sizes = new ResizeObserver(() => take(this, picture));
  picture.sizes.observe(shown);
  this.meshPicture = picture;
  for (const widget of valued(this)) widget.callback = after(widget.callback, () => redraw.call(this));
  foldAdvanced(this);
  fit(this);
}

/** As much of the node's height as what is shown needs; what the person has given it beyond stays. */
function take(node, picture) {
  const needed = picture.shown.offsetHeight;
  if (!needed || needed === picture.height) return; // out of sight it has no height
  const isFirst = picture.height === 0; // of a node that was saved with its height
  const before = node.computeSize()[1];
  picture.height = needed;
  fit(node, Math.max(0, node.size[1] - (isFirst ? node.computeSize()[1] : before)));
}

function forget() {
  clearTimeout(this.meshPicture?.timer);
  this.meshPicture?.sizes.disconnect();
}

function redraw() {
  if (!this.meshPicture) return;
  clearTimeout(this.meshPicture.timer);
  this.meshPicture.timer = setTimeout(() => draw(this, this.meshPicture), WAIT);
}

async function draw(node, picture) {
  const linked = (node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name);
  const asked = ++picture.asked;
  const answer = linked.length > 0 ? null : await meshOf(node);
  if (asked !== picture.asked) return; // asked again meanwhile
  const parts = answer ? told(answer) : [line(`The mesh is known when it runs: a link gives ${linked.join(", ")}.`)];
  picture.shown.replaceChildren(...parts, ...advancedButtons(node));
}

async function meshOf(node) {
  const values = Object.fromEntries(valued(node).map(({ name, value }) => [name, value]));
  try {
    const answer = await api.fetchApi("/parallel_mmdit/mesh", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(values),
    });
    return await answer.json();
  } catch (error) {
    return { error: { message: `The server tells nothing of this mesh: ${error.message}`, remedy: "" } };
  }
}

function told(answer) {
  if (answer.error) return [failure(answer.error)];
  const kinds = Object.entries(KINDS).map(([kind, name]) => ({ ...answer[kind], name }));
  const alike = kinds.every((kind) => !kind.error && kind.describe === kinds[0].describe);
  const shown = alike ? [{ ...kinds[0], name: "SD3, SDXL" }] : kinds;
  const notes = [answer.note, ...kinds.map((kind) => kind.note)].filter(Boolean);
  return [...shown.flatMap((kind) => ofKind(kind, answer)), ...notes.map((note) => line(note))];
}

function ofKind(kind, { ranks, places }) {
  if (kind.error) return [line(`${kind.name}: none. ${kind.error.message} ${kind.error.remedy}`)];
  const boxes = Array.from({ length: ranks }, (_, rank) => ({
    rank,
    label: String(rank),
    title: `rank ${rank}${places[rank] ? `, ${places[rank]}` : ""}`,
  }));
  return [line(`${kind.name}: ${kind.describe}`), meshPicture(boxes, kind.axes, 300)];
}

function failure({ message, remedy }) {
  const made = line(message);
  made.style.color = "var(--error-text, #ff4444)";
  if (remedy) made.append(line(remedy, "var(--input-text, #ddd)"));
  return made;
}

function line(words, colour = "var(--descrip-text, #999)") {
  const made = document.createElement("div");
  made.textContent = words;
  made.style.color = colour;
  return made;
}
