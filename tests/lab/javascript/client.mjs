// Asks a server what programs ask through OpenAI's JavaScript SDK, and prints what came back as one JSON object.
//   node client.mjs URL KEY FUNCTION-JSON
import OpenAI from "openai";

const [url, apiKey, functionJson] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const greedy = { model: "default", temperature: 0 };
const messages = [{ role: "user", content: "Three machines under one roof agreed" }];
const func = JSON.parse(functionJson);

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code };
  }
  return null;
}

async function jsonBeginnings() {
  const bias = {};
  for (const content of ["{", "a{", '{"', 'a{"']) {
    const answer = await fetch(`${url}/tokenize`, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${apiKey}` },
      body: JSON.stringify({ content, with_pieces: true }),
    });
    for (const { id, piece } of (await answer.json()).tokens) if (piece === "{" || piece === '{"') bias[id] = 100;
  }
  return bias;
}

const found = {};

found.models = (await client.models.list()).data.length;

const whole = await client.chat.completions.create({ ...greedy, messages, max_tokens: 24 });
found.chat = whole.choices[0].message.content;
found.usage = whole.usage.completion_tokens;
found.finish = whole.choices[0].finish_reason;

const ids = new Set();
let streamed = "";
let roles = 0;
const stream = await client.chat.completions.create({ ...greedy, messages, max_tokens: 24, stream: true });
for await (const chunk of stream) {
  ids.add(chunk.id);
  const choice = chunk.choices[0];
  if (choice?.delta.role) roles += 1;
  streamed += choice?.delta.content ?? "";
}
Object.assign(found, { streamed, ids: ids.size, roles });

const completion = await client.completions.create({ ...greedy, prompt: messages[0].content, max_tokens: 24 });
found.completion = completion.choices[0].text;

const response = await client.responses.create({ ...greedy, input: messages[0].content, max_output_tokens: 24 });
found.response = response.output_text;

const forced = {
  ...greedy,
  messages,
  max_tokens: 100,
  tools: [{ type: "function", function: func }],
  tool_choice: "required",
  logit_bias: await jsonBeginnings(),
};
const called = await client.chat.completions.create(forced);
found.tool = JSON.parse(called.choices[0].message.tool_calls[0].function.arguments);
const calls = await client.chat.completions.stream(forced).finalChatCompletion();
found.streamedTool = JSON.parse(calls.choices[0].message.tool_calls[0].function.arguments);

const format = { type: "json_schema", json_schema: { name: "forecast", schema: func.parameters, strict: true } };
const structured = await client.chat.completions.create({ ...greedy, messages, max_tokens: 100, response_format: format });
found.structured = JSON.parse(structured.choices[0].message.content);

const vectors = await client.embeddings.create({ model: "default", input: ["Hello"] });
found.dimensions = vectors.data[0].embedding.length;

found.unknownModel = await errorOf(client.chat.completions.create({ ...greedy, model: "gpt-nowhere", messages }));
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
found.wrongKey = await errorOf(stranger.chat.completions.create({ ...greedy, messages, max_tokens: 1 }));

// Leaves in the middle; whoever started this program looks at the slots.
const long = await client.chat.completions.create({ ...greedy, messages, max_tokens: 3500, stream: true });
let heard = 0;
for await (const _ of long) {
  heard += 1;
  if (heard === 5) break;
}
found.left = heard;
console.log(JSON.stringify(found));
