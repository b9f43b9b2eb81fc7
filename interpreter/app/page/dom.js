// Small helpers for the DOM. Text from the server or the user is set only through textContent.

/** @returns {any} the element with this id; index.html has all of them */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element.
 * @param {string} tag
 * @param {Record<string, any>} [properties] set as properties, or as attributes if the name has a dash or is "role"
 * @param {...(Node|string)} children strings become text
 * @returns {any}
 */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Set the text only if it differs, because screen readers read it again after every write. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setShown(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

/** Fill a select with choices. Keep the selected one if it still exists. */
export function setChoices(select, choices) {
  const signature = JSON.stringify(choices);
  if (select.dataset.choices === signature) return;
  select.dataset.choices = signature;
  const before = select.value;
  select.replaceChildren(...choices.map(({ value, label }) => make("option", { value, textContent: label })));
  if (choices.some(({ value }) => value === before)) select.value = before;
}

/** Show progress. Without a total, the bar moves without a value. */
export function setProgress(bar, done, total) {
  if (total > 0) {
    bar.max = total;
    bar.value = Math.min(done, total);
  } else {
    bar.removeAttribute("value");
  }
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
