// Mesh Config's values in saved workflows: a list without names, so each node says in its properties what they are of.
const ORDER = "parallel_mmdit.inputs";
// Of nodes that don't say: the order of the inputs before they did. Earlier files have its beginning.
const FIRST_ORDER = [
  ...["ranks", "device", "devices", "cfg", "ulysses", "ring", "tp", "dp", "dtype", "attention"],
  ...["backend", "memory_budget_mib", "idle_minutes", "patch", "pp", "sliced", "address", "keys"],
  ...["compile", "nan_is_error", "graphs"],
];

// The second value of a node that says nothing: the method in today's order, the device in the first one.
const METHODS = ["exact", "displaced"];

/** The widgets whose values are inputs. The editor's text on a node is none; older editors save it among them, as the last. */
export function valued(node) {
  return (node.widgets ?? []).filter((widget) => widget.serialize !== false && widget.options?.serialize !== false);
}

/** Says in what `serialize` made of the node what its values are of. */
export function sayOrder(node, saved) {
  saved.properties = { ...saved.properties, [ORDER]: valued(node).map((widget) => widget.name).join(",") };
}

/** Whether it says what its values are of; older versions and other programs don't. */
export function saysOrder(saved) {
  return Boolean(saved.properties?.[ORDER]);
}

/** `saved` with its values at the places where the node's widgets are now; what it knows no value of keeps the widget's. */
export function inOrderOf(node, saved) {
  const values = saved.widgets_values;
  if (!Array.isArray(values)) return saved;
  // By a program that goes by the server's list of inputs.
  if (!saysOrder(saved) && METHODS.includes(values[1])) return saved;
  const order = saysOrder(saved) ? saved.properties[ORDER].split(",") : FIRST_ORDER;
  const named = new Map(order.slice(0, values.length).map((name, at) => [name, values[at]]));
  // A text where fewer inputs were is no value of the input that came later.
  const placed = valued(node).map(({ name, value }) => (typeof named.get(name) === typeof value ? named.get(name) : value));
  return { ...saved, widgets_values: placed };
}
