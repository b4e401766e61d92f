// Mesh Config's values in saved workflows: a list without names, so each node says in its properties what they are of.
const ORDER = "parallel_mmdit.inputs";
// Of nodes that don't say: the order of the inputs before they did. Earlier files have its beginning.
const FIRST_ORDER = [
  ...["ranks", "device", "devices", "cfg", "ulysses", "ring", "tp", "dp", "dtype", "attention"],
  ...["backend", "memory_budget_mib", "idle_minutes", "patch", "pp", "sliced", "address", "keys"],
  ...["compile", "nan_is_error", "graphs"],
];

/** The widgets whose values are saved. */
export function valued(node) {
  return (node.widgets ?? []).filter((widget) => widget.serialize !== false);
}

/** Says in what `serialize` made of the node what its values are of. */
export function sayOrder(node, saved) {
  saved.properties = { ...saved.properties, [ORDER]: valued(node).map((widget) => widget.name).join(",") };
}

/** Whether it was saved by a version with another order of inputs. */
export function isOfFirstOrder(saved) {
  // Made by a program that goes by the server's list of inputs, it has as many values as there are now, and says nothing.
  return !saved.properties?.[ORDER] && saved.widgets_values?.length <= FIRST_ORDER.length;
}

/** `saved` with its values at the places where the node's widgets are now; what it knows no value of keeps the widget's. */
export function inOrderOf(node, saved) {
  const values = saved.widgets_values;
  const order = saved.properties?.[ORDER]?.split(",") ?? (isOfFirstOrder(saved) ? FIRST_ORDER : null);
  if (!Array.isArray(values) || !order) return saved;
  const named = new Map(order.slice(0, values.length).map((name, at) => [name, values[at]]));
  const placed = valued(node).map(({ name, value }) => (named.has(name) ? named.get(name) : value));
  return { ...saved, widgets_values: placed };
}
