import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

app.registerExtension({
  name: "ParallelMMDiT.Everywhere",
  settings: [
    {
      id: "ParallelMMDiT.Everywhere",
      category: ["Parallel MMDiT", "Models", "Everywhere"],
      name: "Make every SD3 / SDXL model parallel",
      tooltip:
        "All loaders give parallel MODELs with Mesh Config's defaults, in unchanged workflows. Other families stay as they are. " +
        "PARALLEL_MMDIT_EVERYWHERE=1 does the same for a server without an editor, and goes first when ComfyUI starts.",
      type: "boolean",
      defaultValue: false,
      async onChange(on, before) {
        // When the editor starts, it tells what is stored: the server knows that already, or was told otherwise.
        if (before === undefined || on === before) return;
        const answer = await api.fetchApi("/parallel_mmdit/everywhere", {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ on }),
        });
        if (!answer.ok) {
          app.extensionManager.toast.add({
            severity: "error",
            summary: "Parallel MMDiT",
            detail: `The server did not take the setting: ${answer.status} ${await answer.text()}`,
          });
        }
      },
    },
  ],
});
