// The second Demo Caption that a person puts into a graph is for "no prompt", and so starts empty.
import { app } from "/scripts/app.js";

const TYPE = "DemoCaption";

function stands(graph, node) {
  return graph.nodes.some((other) => other.type === TYPE && other !== node);
}

function startsEmpty(node) {
  let hasValues = false; // those of a copy, of what is pasted, or of a workflow
  const { onConfigure, onAdded } = node;
  node.onConfigure = function (...args) {
    hasValues = true;
    return onConfigure?.apply(this, args);
  };
  node.onAdded = function (graph, ...args) {
    if (!hasValues && !app.configuringGraph && stands(graph, this)) {
      const caption = this.widgets?.find((widget) => widget.name === "caption");
      if (caption) caption.value = "";
    }
    return onAdded?.apply(this, [graph, ...args]);
  };
}

app.registerExtension({
  name: "ParallelMMDiT.DemoCaption",
  nodeCreated(node) {
    if (node.comfyClass === TYPE) startsEmpty(node);
  },
});
