// "Make this workflow parallel": what `parallel-mmdit workflow` does to a file, done to the workflow that is open.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const COMMAND = "ParallelMMDiT.MakeWorkflowParallel";
const LABEL = "Make this workflow parallel";

function tell(severity, summary, lines) {
  app.extensionManager.toast.add({ severity, summary, detail: lines.join("\n"), life: 20000 });
}

async function makeParallel() {
  const graph = app.rootGraph ?? app.graph;
  const answer = await api.fetchApi("/parallel_mmdit/workflow", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ workflow: graph.serialize() }),
  });
  const { workflow, report, error } = await answer.json();
  if (error) {
    tell("error", LABEL, [error.message, error.remedy]);
    return;
  }
  if (report.changed.length > 0) {
    // A tab of its own, so that the workflow stays as it was.
    const name = app.extensionManager.workflow?.activeWorkflow?.filename ?? "workflow";
    await app.loadGraphData(workflow, true, true, `${name}-parallel`);
  }
  const severity = report.runs ? "success" : report.concerns_us ? "warn" : "info";
  tell(severity, report.changed.length > 0 ? "A parallel copy of this workflow" : LABEL, report.lines);
}

app.registerExtension({
  name: "parallel-mmdit.MakeWorkflowParallel",
  commands: [{ id: COMMAND, label: LABEL, icon: "pi pi-share-alt", function: makeParallel }],
  menuCommands: [{ path: ["Edit"], commands: [COMMAND] }],
});
