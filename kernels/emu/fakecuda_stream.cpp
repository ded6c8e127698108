// Streams and events.
#include "fakecuda.h"

using namespace fake;

std::recursive_mutex fake::mutex;
static Stream null_stream;
std::vector<Stream*> fake::streams{&null_stream};

// Handles 0, 1 and 2 are the default stream in its guises.
Stream* fake::stream(void* handle) { return uintptr_t(handle) > 2 ? static_cast<Stream*>(handle) : &null_stream; }

uint64_t fake::random_bits() {
  static uint64_t state = 0;
  if (!state) {
    const char* s = getenv("EMU_SEED");
    state = (s ? strtoull(s, nullptr, 10) + 1 : 1) * 0x9E3779B97F4A7C15ull | 1;
  }
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

void fake::drain(Stream* until) {
  for (;;) {
    std::vector<Stream*> busy;
    for (Stream* s : streams)
      if (!s->queue.empty()) busy.push_back(s);
    if (until ? until->queue.empty() : busy.empty()) return;
    bool ran = false;
    const size_t first = random_bits() % busy.size();
    for (size_t i = 0; i < busy.size() && !ran; i++) {
      Stream* s = busy[(first + i) % busy.size()];
      if (!s->queue.front()()) continue;
      s->queue.pop_front();
      ran = true;
    }
    if (!ran) {
      fprintf(stderr, "fakecuda: streams wait for each other\n");
      abort();
    }
  }
}

CUresult fake::enqueue(void* handle, Op op) {
  Stream* s = stream(handle);
  if (s->capture && s->capture->spoilt) return CAPTURE_INVALIDATED;
  if (s->capture) s->capture->graph.push_back(std::move(op));
  else s->queue.push_back(std::move(op));
  return OK;
}

API cuCtxSynchronize() {
  LOCK;
  if (int e = may_wait()) return e;
  drain(nullptr);
  return OK;
}
API cuStreamCreate(void** s, unsigned) {
  LOCK;
  Stream* x = new Stream;
  streams.push_back(x);
  *s = x;
  return OK;
}
API cuStreamCreateWithPriority(void** s, unsigned flags, int) { return cuStreamCreate(s, flags); }
API cuStreamSynchronize(void* s) {
  LOCK;
  if (stream(s)->capture) return refuse(stream(s), CAPTURE_UNSUPPORTED);
  drain(stream(s));
  return OK;
}
API cuStreamDestroy_v2(void* s) {
  LOCK;
  drain(stream(s));
  for (size_t i = 0; i < streams.size(); i++)
    if (streams[i] == s) streams.erase(streams.begin() + ptrdiff_t(i));
  delete static_cast<Stream*>(s);
  return OK;
}
API cuStreamWaitEvent(void* handle, void* e, unsigned) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  Stream* s = stream(handle);
  if (s->capture && s->capture.get() == event->capture) return OK;  // one stream is in order as it is
  if (s->capture) return refuse(s, CAPTURE_ISOLATION);
  if (event->capture) return NOT_SUPPORTED;
  return enqueue(handle, [event, want = event->recorded] { return event->done >= want; });
}
API cuEventCreate(void** e, unsigned) {
  *e = new Event;
  return OK;
}
API cuEventDestroy_v2(void* e) {
  LOCK;
  drain(nullptr);
  delete static_cast<Event*>(e);
  return OK;
}
API cuEventRecord(void* e, void* s) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  event->capture = stream(s)->capture.get();
  if (event->capture) return event->capture->spoilt ? CAPTURE_INVALIDATED : OK;
  return enqueue(s, [event, number = ++event->recorded] {
    event->done = number;
    event->at = Clock::now();
    return true;
  });
}
API cuEventSynchronize(void* e) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  if (event->capture) return CAPTURED_EVENT;
  if (int e = may_wait()) return e;
  if (event->done < event->recorded) drain(nullptr);
  return OK;
}
API cuEventQuery(void* e) {
  LOCK;
  Event* event = static_cast<Event*>(e);
  if (event->capture) return CAPTURED_EVENT;
  if (int e = may_wait()) return e;
  return event->done < event->recorded ? NOT_READY : OK;
}
API cuEventElapsedTime(float* ms, void* a, void* b) {
  LOCK;
  if (int e = cuEventSynchronize(b)) return e;
  *ms = std::chrono::duration<float, std::milli>(static_cast<Event*>(b)->at - static_cast<Event*>(a)->at).count();
  return OK;
}
API cuEventElapsedTime_v2(float* ms, void* a, void* b) { return cuEventElapsedTime(ms, a, b); }
API cuLaunchHostFunc(void* s, void (*fn)(void*), void* data) {
  LOCK;
  return enqueue(s, [=] {
    fn(data);
    return true;
  });
}
