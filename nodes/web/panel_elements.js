// Elements of the backend panel, made once and changed in place, so that focus and scroll stay. Text is never markup.

/** An element with a class and children, which are elements or words. */
export function made(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** A button that does not submit; `press` is called with it. */
export function button(words, press) {
  const element = made("button", "pm-button", words);
  element.type = "button";
  element.addEventListener("click", () => press(element));
  return element;
}

/** Shows these words; an element without any is hidden. */
export function tell(element, words) {
  if (element.textContent !== words) element.textContent = words;
  element.hidden = !words;
}

/** A box for an error of the server's: what happened, the remedy, then the details. `dismiss` closes it, where that is given. */
export class ErrorBox {
  constructor(dismiss) {
    this.parts = { message: made("p"), remedy: made("p"), details: made("pre") };
    this.root = made("div", "pm-error", ...Object.values(this.parts));
    if (dismiss) this.root.append(button("Dismiss", dismiss));
    this.root.setAttribute("role", "alert");
    this.show(null);
  }

  show(error) {
    for (const [name, part] of Object.entries(this.parts)) tell(part, error?.[name] ?? "");
    this.root.hidden = !error;
  }
}

/** Shows one element for each item, in their order: made by `make` for a key that is new, then changed by `update`. */
export function keepList(list, items, keyOf, make, update) {
  const old = new Map([...list.children].map((element) => [element.dataset.key, element]));
  items.forEach((item, at) => {
    const key = keyOf(item);
    const element = old.get(key) ?? make(item);
    element.dataset.key = key;
    old.delete(key);
    if (list.children[at] !== element) list.insertBefore(element, list.children[at] ?? null);
    update(element, item);
  });
  for (const element of old.values()) element.remove();
}
