// What the backend panel says, from what /parallel_mmdit/status answers. A backend of an older version answers less.
const GIB = 2 ** 30;
const MIB = 2 ** 20;
const LOADS = ["LoadModel", "LoadVAE", "LoadControl"];
const DOING = {
  start: "starting",
  restart: "restarting",
  "restart as asked": "restarting",
  stop: "stopping",
  free: "freeing the models",
};
// A sampler that runs in ComfyUI asks for one evaluation after the other; between two of them the backend isn't idle.
const BETWEEN_EVALUATIONS = 2;

export function count(number, what) {
  return `${number} ${what}${number === 1 ? "" : "s"}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

export function mib(bytes) {
  const size = bytes / MIB;
  return `${size >= 10 || size === 0 ? Math.round(size) : size.toFixed(1)} MiB`;
}

function ofTotal(done, total) {
  const [name, size] = total >= GIB ? ["GiB", GIB] : ["MiB", MIB];
  return `${(done / size).toFixed(1)} of ${(total / size).toFixed(1)} ${name}`;
}

/** The state as one word or two, and how far it is: `kind` colours it, `part` is 0 to 1 where that is known. */
export function stateOf(entry) {
  if (entry.doing && entry.doing.do !== "free") {
    return { kind: "busy", what: DOING[entry.doing.do], far: waiting(entry.doing.waits_for, entry.doing.seconds) };
  }
  if (entry.phase === "starting") return { kind: "busy", what: "starting", far: waiting(entry.waits_for) };
  if (entry.phase === "gone") return { kind: "wrong", what: "not running", far: "" };
  if (entry.error) return { kind: "wrong", what: entry.phase === "silent" ? "does not answer" : "error", far: "" };
  if (entry.job) return stateOfJob(entry.job);
  if (entry.doing) return { kind: "busy", what: DOING[entry.doing.do], far: "" };
  if (entry.last?.kind === "Forward" && entry.quiet < BETWEEN_EVALUATIONS) {
    return { kind: "busy", what: "drawing", far: "step by step" };
  }
  return { kind: "idle", what: "idle", far: entry.quiet >= 60 ? `for ${duration(entry.quiet)}` : "" };
}

function waiting(what, seconds) {
  return [what, seconds === undefined ? "" : duration(seconds)].filter(Boolean).join(", ");
}

function stateOfJob(job) {
  const part = job.total > 0 ? job.done / job.total : null;
  if (LOADS.includes(job.kind)) {
    const far = job.unit === "bytes" && job.total ? ofTotal(job.done, job.total) : job.model;
    return { kind: "busy", what: "loading", far, part: job.unit === "bytes" ? part : null };
  }
  if (job.kind === "Sample") {
    const step = job.total ? `step ${job.done} of ${job.total}` : "first step";
    return { kind: "busy", what: "drawing", far: job.what || step, part: job.what ? null : part };
  }
  const [what, far] = {
    Forward: ["drawing", "step by step"],
    Decode: ["decoding", ""],
    Encode: ["encoding", ""],
    Unload: ["freeing the models", ""],
  }[job.kind] ?? ["working", job.kind];
  return { kind: "busy", what, far };
}

/** Of the running job: its file, seconds a step, and whose it is where it isn't this ComfyUI's. */
export function jobLine(job, ownClient) {
  if (!job) return "";
  const step = job.step_seconds ? `${job.step_seconds.toFixed(2)} s a step` : "";
  const of = job.client && job.client !== ownClient ? `for another program (${job.client})` : "";
  return [job.model, step, duration(job.seconds), of].filter(Boolean).join(" · ");
}

/** What the last sampling cost. */
export function costLine(last) {
  if (!last) return "";
  const each = last.steps > 1 ? ` (${(last.seconds / last.steps).toFixed(2)} a step)` : "";
  const waited = last.waited == null ? "" : `${Math.round((100 * last.waited) / last.seconds)} % waiting for other ranks`;
  const took = `${count(last.steps, "step")} in ${last.seconds.toFixed(1)} s${each}`;
  return `Last: ${[last.model, took, waited, `${mib(last.sent_bytes)} sent`].filter(Boolean).join(" · ")}`;
}

export function othersOf(entry, ownClient) {
  return (entry.clients ?? []).filter((client) => client !== ownClient);
}

/** Who waits, and who else is connected. */
export function queueLine(entry, ownClient) {
  const others = othersOf(entry, ownClient);
  const queued = entry.queued ? `${count(entry.queued, "job")} ${entry.queued === 1 ? "waits" : "wait"}` : "";
  const used = others.length ? `also used by ${others.join(", ")}` : "";
  return [queued, used].filter(Boolean).join(" · ");
}

export function uptimeLine(entry) {
  const up = entry.uptime === undefined ? "" : `up ${duration(entry.uptime)}`;
  const restarts = entry.restarts ? count(entry.restarts, "restart") : "";
  return [up, entry.version ? `version ${entry.version}` : "", restarts].filter(Boolean).join(" · ");
}

/** The ranks' devices, equal ones together. */
export function devicesLine(ranks) {
  const kinds = new Map();
  for (const rank of ranks) {
    const name = rank.device === "cpu" ? `CPU, ${rank.device_name} each` : rank.device_name;
    kinds.set(name, (kinds.get(name) ?? 0) + 1);
  }
  return [...kinds].map(([name, number]) => `${count(number, "rank")} on ${name}`).join("; ");
}

/** A rank as the picture of the mesh takes it. */
export function pictured(rank) {
  const [used, free, total] = [rank.used_bytes, rank.free_bytes, rank.total_bytes].map((bytes) => bytes / GIB);
  return {
    rank: rank.rank,
    label: `${rank.rank}: ${rank.device}`,
    detail: total ? `${used.toFixed(1)}/${total.toFixed(total < 10 ? 1 : 0)} GiB` : "",
    fill: total ? used / total : null,
    title:
      `rank ${rank.rank}: ${rank.device_name} (${rank.device}) on ${rank.host}, process ${rank.pid}\n` +
      `${used.toFixed(2)} GiB used by it, ${free.toFixed(2)} of ${total.toFixed(2)} GiB free`,
  };
}

/** A model that is held, below its name. */
export function modelLine(model) {
  const patches = model.patched ? `patches on ${count(model.patched, "weight")}` : "";
  return [model.family, model.mesh, model.dtype, `${mib(model.rank_bytes)} a rank`, patches].filter(Boolean).join(" · ");
}

/** What is lost where the backend ends now; empty where nobody would notice. */
export function lossOf(entry, ownClient) {
  const others = othersOf(entry, ownClient);
  const state = entry.job ? stateOfJob(entry.job) : null;
  return [
    state ? `the job that runs (${[state.what, entry.job.model, state.far].filter(Boolean).join(", ")})` : "",
    entry.queued ? `${count(entry.queued, "job")} that ${entry.queued === 1 ? "waits" : "wait"}` : "",
    others.length ? `what ${count(others.length, "other program")} ${others.length === 1 ? "does" : "do"} with it (${others.join(", ")})` : "",
  ]
    .filter(Boolean)
    .join("; ");
}

/** What a node has asked for and not got. */
export function refusalLine(differences) {
  const told = (differences ?? []).map(({ there, asked }) => `it has ${there}, ${asked}`);
  return told.length ? `A node was refused, because this backend is in use: ${told.join("; ")}.` : "";
}
