// Conversations, with their files, in this browser's own database.

const NAME = "longspan", STORE = "conversations";
const CURRENT = "longspan-current", OPTIONS = "longspan-options";

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let opened = null;

async function store(mode) {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return (await opened).transaction(STORE, mode).objectStore(STORE);
}

// A conversation: {id, at, title, messages, draft}.
export const save = async (conversation) => done((await store("readwrite")).put(conversation));
export const load = async (id) => done((await store("readonly")).get(id));
export const remove = async (id) => done((await store("readwrite")).delete(id));
export const clear = async () => done((await store("readwrite")).clear());

// The newest first.
export async function all() {
  return (await done((await store("readonly")).getAll())).sort((a, b) => b.at - a.at);
}

// Of this tab, so that two tabs hold two conversations.
export const current = {
  get: () => sessionStorage.getItem(CURRENT),
  set: (id) => sessionStorage.setItem(CURRENT, id),
};

export const options = {
  get: () => JSON.parse(localStorage.getItem(OPTIONS) ?? "{}"),
  set: (values) => localStorage.setItem(OPTIONS, JSON.stringify(values)),
};
