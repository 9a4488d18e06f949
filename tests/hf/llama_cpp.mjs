// What llama.cpp computes from a GGUF file, in float32: reads a job from stdin, writes the result to stdout, both JSON.
//
//   node llama_cpp.mjs < {"file": PATH, "texts": [..], "rows": [[ids], ..], "count": N}
//   > {"tokens": ids of each text, "logits": [row][position][id], "greedy": N ids that follow each text}
//
// Needs `npm install node-llama-cpp` in the working directory or one above it; its Linux binaries come built.
import {createRequire} from "node:module";
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const entry = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry).href);
const {file, texts, rows, count} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
    contextSize: 256, threads: 1, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false,
});

async function once(evaluate) {
    const sequence = context.getSequence();
    const result = await evaluate(sequence);
    sequence.dispose();
    return result;
}

async function greedyIds(sequence, ids) {
    const found = [];
    if (count) for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true}))
        if (found.push(token) >= count) break;
    return found;
}

async function allLogits(sequence, ids) {
    const given = ids.map((id) => [id, {generateNext: {logits: true, options: {temperature: 0}}}]);
    const outputs = await sequence.controlledEvaluate(given);
    return outputs.map(({next}) => [...next.logits].sort(([a], [b]) => a - b).map(([, value]) => value));
}

const tokens = texts.map((text) => [...model.tokenize(text)]);
const logits = [], greedy = [];
for (const ids of rows) logits.push(await once((sequence) => allLogits(sequence, ids)));
for (const ids of tokens) greedy.push(await once((sequence) => greedyIds(sequence, ids)));
process.stdout.write(JSON.stringify({tokens, logits, greedy}));
