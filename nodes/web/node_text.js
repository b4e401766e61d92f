// A node that has failed and whose result ComfyUI still has, of inputs as they are again, does not run: nothing takes its text away.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const TEXT = "$$node-text-preview"; // the editor's own name of it
const CATEGORY = "parallel"; // of this pack's nodes
const FAILED = /^(Failed: |Interrupted$)/; // as nodes/node_text.py says it

// Ids of nodes in subgraphs are those of all nodes on the way to them.
function nodeAt(id) {
  const graph = app.rootGraph ?? app.graph;
  return String(id)
    .split(":")
    .reduce((at, part) => (at?.subgraph ?? at)?.getNodeById?.(Number(part)), graph);
}

function forgetFailures({ detail }) {
  for (const id of detail?.nodes ?? []) {
    const node = nodeAt(id);
    const text = node?.widgets?.find((widget) => widget.name === TEXT);
    // What other packs say on their nodes is theirs.
    if (node?.constructor?.nodeData?.category === CATEGORY && FAILED.test(text?.value ?? "")) {
      text.value = "done";
    }
  }
  app.canvas?.setDirty(true);
}

app.registerExtension({
  name: "ParallelMMDiT.NodeText",
  setup() {
    api.addEventListener("execution_cached", forgetFailures);
  },
});
