// Numbers, times and sizes as people read them.

export const number = (value) => Math.round(value).toLocaleString("en");

export const seconds = (ms) => ms < 995 ? `${Math.max(1, Math.round(ms))} ms`
  : ms < 99500 ? `${(ms / 1000).toFixed(1)} s`
  : `${Math.floor(ms / 60000)} min ${Math.round(ms / 1000) % 60} s`;

export const count = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;

export const $ = (id) => document.getElementById(id);

export function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, options);
  element.append(...children);
  return element;
}
