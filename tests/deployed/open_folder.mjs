// Opens folders with transformers.js and prints one line of JSON for each input.
// node open_folder.mjs NODE_MODULES DTYPE < questions.json, a list of folder, task and inputs
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, dtype] = process.argv.slice(2);
const entry = createRequire(`${modules}/x.js`).resolve("@huggingface/transformers");
const library = await import(pathToFileURL(entry));
const js = library.default ?? library;
js.env.allowRemoteModels = false;
const options = { dtype, device: "cpu" };
const classes = {
  "image-classification": js.AutoModelForImageClassification,
  "text-classification": js.AutoModelForSequenceClassification,
  "sentence-embedding": js.AutoModel,
  "causal-lm": js.AutoModelForCausalLM,
};
for (const { folder, task, inputs } of JSON.parse(readFileSync(0, "utf-8"))) {
  js.env.localModelPath = `${dirname(folder)}/`;
  const name = basename(folder);
  const model = await classes[task].from_pretrained(name, options);
  const preprocessor = await (task === "image-classification" ? js.AutoProcessor : js.AutoTokenizer)
    .from_pretrained(name);
  for (const input of inputs) {
    let given;
    if (task === "image-classification") {
      const { data, width, height } = input;
      given = await preprocessor(new js.RawImage(Uint8ClampedArray.from(data), width, height, 3));
    } else {
      given = preprocessor(input, { truncation: true });
    }
    // model(...) of a causal model would ask the graph for a cache of keys and values
    const names = model.sessions.model.inputNames;
    const feeds = Object.fromEntries(names.map((n) => [n, given[n]]));
    const found = task === "causal-lm"
      ? await model.sessions.model.run(Object.fromEntries(names.map((n) => [n, feeds[n].ort_tensor])))
      : await model(feeds);
    const tensor = found.logits ?? found.last_hidden_state;
    console.log(JSON.stringify({ dims: [...tensor.dims], values: [...tensor.data] }));
  }
}
