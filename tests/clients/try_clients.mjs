// Tries the clients of Node against a running server (`python tests/clients/try_clients.py serve`):
//
//   npm install openai ai @ai-sdk/openai-compatible zod
//   node tests/clients/try_clients.mjs http://127.0.0.1:8000/v1
//
// Packages are looked for beside this file, and in folders above it.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [url, name = "nano"] = process.argv.slice(2);
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const cities = ["Paris", "Rome"];
const schema = z.object({ city: z.enum(cities) });
const description = "Tells the weather of a city.";
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const model = createOpenAICompatible({
  name: "longspan", baseURL: url, apiKey: "none", supportsStructuredOutputs: true })(name);
const asked = { model, prompt: messages[0].content, maxOutputTokens: 256, maxRetries: 0 };
const required = {
  toolChoice: "required", tools: { Weather: tool({ description, inputSchema: schema }) } };

const attempts = {
  "openai: chat and stream": async () => {
    const reply = await client.chat.completions.create({ model: name, messages, max_tokens: 16 });
    assert(reply.choices[0].message.content);
    const stream = await client.chat.completions.create({
      model: name, messages, max_tokens: 16, stream: true });
    let last;
    for await (const chunk of stream) last = chunk;
    assert(last.choices[0].finish_reason);
  },
  "openai: streamed call": async () => {
    const stream = client.chat.completions.stream({
      model: name, messages, max_tokens: 64,
      tool_choice: { type: "function", function: { name: "Weather" } },
      tools: [{ type: "function", function: { name: "Weather", description, parameters: {
        type: "object", properties: { city: { enum: cities } }, required: ["city"],
        additionalProperties: false } } }] });
    const message = await stream.finalMessage();
    assert(cities.includes(JSON.parse(message.tool_calls[0].function.arguments).city));
  },
  "ai-sdk: generateText and streamText": async () => {
    assert((await generateText(asked)).text);
    let text = "";
    for await (const piece of streamText(asked).textStream) text += piece;
    assert(text);
  },
  "ai-sdk: required tools, streamed and not": async () => {
    const whole = await generateText({ ...asked, ...required });
    assert(cities.includes(whole.toolCalls[0].input.city));
    const streamed = await streamText({ ...asked, ...required }).toolCalls;
    assert(cities.includes(streamed[0].input.city));
  },
  "ai-sdk: generateObject": async () => {
    assert(cities.includes((await generateObject({ ...asked, schema })).object.city));
  },
};

let failures = 0;
for (const [what, attempt] of Object.entries(attempts)) {
  try {
    await attempt();
    console.log(`| ${what} | works |`);
  } catch (error) {
    failures += 1;
    console.log(`| ${what} | FAILS: ${String(error).slice(0, 200)} |`);
  }
}
process.exit(failures);
