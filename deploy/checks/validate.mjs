// Says what is wrong with custom resources: `node validate.mjs OBJECTS.json`, where the file holds an array of objects.
// Prints a JSON array with a list of complaints for each object, in the same order.
//
// The schemas are those of the projects' own CRDs, as @kubernetes-models has them. Like an API server they let pass
// fields that they do not know, which is how a misspelt field goes unnoticed. So this watches what a schema looks at: a
// field beside those, that the schema never asks for, is one that it does not know. Except `description`: together with
// the descriptions of fields, the fields of that name have been taken out of these schemas.
import { readFileSync } from "node:fs";

const packages = ["argo-cd", "argo-rollouts", "flux-cd", "gateway-api", "istio", "prometheus-operator"];

async function model(apiVersion, kind) {
  for (const name of packages) {
    try {
      const module = await import(`@kubernetes-models/${name}/${apiVersion}/${kind}`);
      return module[kind];
    } catch (error) {
      if (!["ERR_MODULE_NOT_FOUND", "ERR_PACKAGE_PATH_NOT_EXPORTED"].includes(error.code)) throw error;
    }
  }
  return undefined;
}

// A view of a value that notes which fields are asked for. Maps with free keys are walked by their validators key by
// key, so all of theirs are noted; an object that is never looked into is one that may hold anything.
function watched(value, path, seen) {
  if (value === null || typeof value !== "object") return value;
  const asked = new Set();
  const children = new Map();
  seen.push({ value, path, asked });
  return new Proxy(value, {
    get(target, key) {
      const field = target[key];
      if (typeof key !== "string" || typeof field === "function") return field;
      asked.add(key);
      if (!children.has(key)) children.set(key, watched(field, `${path}/${key}`, seen));
      return children.get(key);
    },
  });
}

function unknownFields(seen) {
  return seen
    .filter(({ value, asked }) => !Array.isArray(value) && asked.size > 0)
    .flatMap(({ value, path, asked }) =>
      Object.keys(value)
        .filter((key) => !asked.has(key) && key !== "description")
        .map((key) => `${path}/${key} is not known to the schema`),
    );
}

async function complaints(object) {
  const Model = await model(object.apiVersion, object.kind);
  if (!Model) return [`${object.apiVersion} ${object.kind} is not known`];
  const seen = [];
  const view = watched(object, "", seen);
  try {
    // The method is called on the view, since the model itself would be a copy of what it is given.
    Model.prototype.validate.call(view);
  } catch (error) {
    return [error.message];
  }
  return unknownFields(seen);
}

const objects = JSON.parse(readFileSync(process.argv[2], "utf8"));
const answers = [];
for (const object of objects) answers.push(await complaints(object));
console.log(JSON.stringify(answers));
