// A finished folder, run by transformers.js and onnxruntime-web: nothing leaves the browser.
// ?model=NAME is a folder below models/, ?dtype=fp32 or q8 the ONNX file.
import * as js from "./lib/transformers.min.js";

const asked = new URLSearchParams(location.search);
const name = asked.get("model") ?? "model";
const dtype = asked.get("dtype") ?? "fp32";
const MOST_TOKENS = 32; // of a generated text
const KINDS = [
  ["ForImageClassification", "image-classification"],
  ["ForSequenceClassification", "text-classification"],
  ["ForMaskedLM", "fill-mask"],
  ["ForCausalLM", "text-generation"],
  ["LMHeadModel", "text-generation"],
];
const find = (id) => document.getElementById(id);
const show = (id, shown = true) => { find(id).hidden = !shown; };

js.env.allowRemoteModels = false;
js.env.allowLocalModels = true;
js.env.localModelPath = "models/"; // whole addresses count as remote ones
js.env.backends.onnx.wasm.wasmPaths = new URL("lib/", location.href).href;
js.env.backends.onnx.wasm.numThreads = 1; // more need cross-origin isolation

async function open() {
  if (!/^[\w.-]+$/.test(name)) throw new Error(`no legal name of a model: ${name}`);
  const response = await fetch(`models/${name}/config.json`);
  if (!response.ok) throw new Error(`models/${name}/config.json: ${response.status}`);
  const config = await response.json();
  const named = config.architectures?.[0] ?? "";
  const task = KINDS.find(([ending]) => named.endsWith(ending))?.[1] ?? "feature-extraction";
  const options = { dtype, device: "wasm" };
  // the graph has no cache of keys and values, which the library's own generation counts on
  const run = task === "text-generation"
    ? await generator(options)
    : await js.pipeline(task, name, options);
  find("status").textContent = `${name}: ${task}, ${dtype}`;
  const kind = task === "image-classification" ? ["file-label", "file"] : ["text-label", "text"];
  kind.forEach((id) => show(id));
  show("ask");
  find("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(task, run); });
  find("file").addEventListener("change", () => ask(task, run));
}

async function generator(options) {
  const tokenizer = await js.AutoTokenizer.from_pretrained(name);
  const model = await js.AutoModelForCausalLM.from_pretrained(name, options);
  const session = model.sessions.model;
  const end = [model.config.eos_token_id].flat();
  return async (text) => {
    const ids = [...tokenizer(text).input_ids.data];
    const begin = ids.length;
    while (ids.length - begin < MOST_TOKENS) {
      const dims = [1, ids.length];
      const every = {
        input_ids: new js.Tensor("int64", BigInt64Array.from(ids), dims).ort_tensor,
        attention_mask: new js.Tensor("int64", new BigInt64Array(ids.length).fill(1n), dims)
          .ort_tensor,
      };
      const { logits } = await session.run(
        Object.fromEntries(session.inputNames.map((input) => [input, every[input]])),
      );
      const size = logits.dims.at(-1);
      const last = logits.data.subarray(logits.data.length - size);
      const token = last.reduce((best, value, i) => (value > last[best] ? i : best), 0);
      if (end.includes(token)) break;
      ids.push(BigInt(token));
    }
    return [{ generated_text: tokenizer.decode(ids, { skip_special_tokens: true }) }];
  };
}

async function ask(task, run) {
  const button = find("send");
  if (button.disabled) return;
  button.disabled = true;
  show("error", false);
  let url = null;
  try {
    let given = find("text").value;
    if (task === "image-classification") {
      const file = find("file").files[0];
      if (!file) throw new Error("Choose an image first.");
      given = url = URL.createObjectURL(file);
    }
    const begin = performance.now();
    const options = task === "feature-extraction" ? { pooling: "mean", normalize: true } : {};
    render(await run(given, options));
    find("time").textContent = `${(performance.now() - begin).toFixed(1)} ms in this browser`;
    show("result");
  } catch (error) {
    fail(error);
  } finally {
    if (url) URL.revokeObjectURL(url);
    button.disabled = false;
  }
}

function render(found) {
  const rows = found.data ? [] : found;
  const first = rows[0] ?? {};
  find("headline").textContent = found.data
    ? `A vector of ${found.dims.at(-1)} numbers: ${[...found.data.slice(0, 8)].map((x) => x.toFixed(3)).join(" ")} …`
    : first.generated_text ?? first.sequence ?? first.label;
  find("scores").replaceChildren(...rows.filter((r) => "score" in r).map(({ label, token_str, score }) => {
    const item = document.createElement("li");
    for (const [kind, text] of [["bar", ""], ["label", label ?? token_str],
      ["score", `${(100 * score).toFixed(1)} %`]]) {
      const part = document.createElement("span");
      part.className = kind;
      part.textContent = text;
      if (kind === "bar") part.style.width = `${100 * score}%`;
      item.append(part);
    }
    return item;
  }));
}

function fail(error) {
  find("error").textContent = error.message;
  show("error");
}

open().catch((error) => {
  find("status").textContent = "The model can't be opened.";
  fail(error);
});
