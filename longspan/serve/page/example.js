// A document and a question that every model here can be tried with, nano above all.

export const ABOUT_NANO = "nano is a model of 15 million parameters that finds facts in long "
  + "texts, on any machine. It answers questions like the example's; it does not chat, summarise "
  + "or program. For that, serve another model.";
export const ABOUT = "The example hides three numbers in a ship's log and asks for one of them.";

const KEYS = ["quiet-harbor", "amber-lantern", "northern-kite", "copper-thistle", "early-comet"];
const WINDS = ["a light wind from the west", "a gale from the north", "no wind at all",
  "rain until noon", "fog in the morning"];
const SIGHTS = ["whales", "gulls", "dolphins", "other ships", "icebergs"];
const NUM_DAYS = 70;

const any = (values) => values[Math.floor(Math.random() * values.length)];
const digits = () => String(1000000 + Math.floor(9000000 * Math.random()));

export function example() {
  const lines = Array.from({ length: NUM_DAYS }, (_, day) => `On day ${day + 1} there was `
    + `${any(WINDS)}, and the crew of the Ada saw ${1 + Math.floor(90 * Math.random())} `
    + `${any(SIGHTS)} before the evening.`);
  const keys = KEYS.toSorted(() => Math.random() - 0.5).slice(0, 3);
  const answers = keys.map(digits);
  keys.forEach((key, index) => lines.splice(Math.floor(Math.random() * lines.length), 0,
    `One of the special magic numbers for ${key} is: ${answers[index]}.`));
  return { file: { name: "log of the Ada.txt", text: lines.join("\n") }, answer: answers[0],
    question: `What is the special magic number for ${keys[0]} mentioned in the provided text? `
      + "Answer with the number only." };
}
