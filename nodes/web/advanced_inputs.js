// Advanced inputs out of sight in the classic editor too, which has no button for that; Nodes 2.0 does it by itself.
const ROW = 24; // px of an input, as the classic editor computes it

function isClassic() {
  return !globalThis.LiteGraph?.vueNodesMode;
}

/** Advanced inputs of the node are seen where they are asked for, or linked. */
export function foldAdvanced(node) {
  for (const widget of advancedOf(node)) {
    const isLinked = () => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
    // Asked each time: the person may change over to Nodes 2.0, which would take them for hidden for good.
    const get = () => isClassic() && !node.showAdvanced && !isLinked();
    Object.defineProperty(widget, "hidden", { configurable: true, get, set() {} });
  }
}

/** Buttons that show and hide them: one, or none where the core doesn't tell which they are. */
export function advancedButtons(node) {
  if (advancedOf(node).length === 0) return [];
  const button = document.createElement("button");
  button.className = "parallel-mmdit-advanced";
  button.textContent = words(node);
  button.addEventListener("click", () => {
    node.showAdvanced = !node.showAdvanced;
    button.textContent = words(node);
    fit(node);
  });
  return [button];
}

function words(node) {
  return node.showAdvanced ? "Hide advanced inputs" : "Show advanced inputs";
}

/** As high as what is seen of the node, and `room` px. */
export function fit(node, room = 0) {
  // Nodes 2.0 hides them by itself, and makes a node higher where it has to: its rows are higher than these.
  const unseen = isClassic() || node.showAdvanced ? 0 : advancedOf(node).length * ROW;
  node.setSize([node.size[0], node.computeSize()[1] - unseen + room]);
  node.graph?.setDirtyCanvas(true, true);
}

function advancedOf(node) {
  return (node.widgets ?? []).filter((widget) => widget.options?.advanced);
}

const style = document.createElement("style");
style.textContent = `
  .parallel-mmdit-advanced {
    align-self: stretch; padding: 2px; cursor: pointer; font: inherit; border-radius: 4px;
    color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #555);
  }
  .lg-node .parallel-mmdit-advanced { display: none; }
`;
document.head.append(style);
