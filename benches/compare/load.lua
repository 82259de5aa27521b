-- Requests of many users, made before the load begins; the method, the path, the size of a body and whether
-- each request has a connection of its own come from the environment. Prints its figures as JSON.
local method = os.getenv("LOAD_METHOD") or "GET"
local path = os.getenv("LOAD_PATH") or "/128"
local size = tonumber(os.getenv("LOAD_BODY") or "0")
local close = os.getenv("LOAD_CLOSE") == "1"
local body = size > 0 and string.rep("x", size) or nil
local requests, turn = {}, 0

init = function()
  for user = 1, 1024 do
    local headers = {
      ["Host"] = "shop.example.com",
      ["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64)",
      ["Accept"] = "text/html,application/json",
      ["x-user-id"] = "user-" .. user,
    }
    if close then headers["Connection"] = "close" end
    requests[user] = wrk.format(method, path, headers, body)
  end
end

request = function()
  turn = turn % 1024 + 1
  return requests[turn]
end

done = function(summary, latency)
  local errors = summary.errors
  print(string.format(
    '{"requests":%d,"duration":%d,"p50":%d,"p99":%d,"p999":%d,"errors":%d}',
    summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
