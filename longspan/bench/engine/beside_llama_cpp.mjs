// The other side of `longspan bench llama-cpp`: a line {"ids": [...], "num_answer": n} in, one with
// seconds and bytes out. Run in a folder where `npm i -E node-llama-cpp@3.21.1` was run.
//
//   node beside_llama_cpp.mjs FILE.gguf THREADS CONTEXT
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { join } from "node:path";

const found = createRequire(join(process.cwd(), "package.json")).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(found));
const [file, threads, contextSize] = process.argv.slice(2);
const llama = await getLlama({
  gpu: false, build: "never", maxThreads: Number(threads), logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({
  contextSize: Number(contextSize), threads: Number(threads), batchSize: 512 });
const sequence = context.getSequence();

const seconds = () => performance.now() / 1e3;
const cpuSeconds = () => { const { user, system } = process.cpuUsage(); return (user + system) / 1e6; };

for await (const line of createInterface({ input: process.stdin })) {
  const { ids, num_answer: numAnswer } = JSON.parse(line);
  await sequence.clearHistory();
  let count = 0, first = 0, firstCpu = 0;
  const begun = seconds(), begunCpu = cpuSeconds();
  for await (const _ of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    if (count++ === 0) { first = seconds(); firstCpu = cpuSeconds(); }
    if (count > numAnswer) break;
  }
  console.log(JSON.stringify({
    prefill_s: first - begun, prefill_cpu_s: firstCpu - begunCpu,
    decode_s: seconds() - first, decode_cpu_s: cpuSeconds() - firstCpu,
    peak_memory_bytes: 1024 * process.resourceUsage().maxRSS }));
}
process.exit(0);
