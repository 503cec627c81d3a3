// What `tickets.py` asks of a driver. A stream is a number: its id is 100 more, and that of its capture 10 more.
typedef unsigned long long id;

int cuStreamGetId(void* stream, id* number) {
  *number = (id)stream + 100;
  return stream == (void*)6;  // a driver that fails
}

int cuStreamGetCaptureInfo_v2(void* stream, int* status, id* capture, void** graph, void** dependencies, void* count) {
  *capture = (id)stream + 10;
  *status = stream >= (void*)5;
  return graph || dependencies || count || stream == (void*)7;
}
