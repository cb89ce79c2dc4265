"""
Stand-ins for the CANN libraries that torch_npu is linked against, so that it can be imported on a machine without them.

    python tests/npu_stubs.py SITE OUT      # SITE: folder that holds torch_npu; needs gcc, nm and readelf

The names come from `nm` on the installed wheel; no CANN header or source is used. Questions about devices, streams and
events are answered as if one Ascend910B1 were there, which is what autograd asks for. Memory, copies, kernels and
operators fail with an error code: no real NPU tensor can exist and no number can be computed, so only FakeTensors work.
torch.npu.is_available() then says True: use it in a process of its own.
"""
import glob
import importlib.util
import os
import subprocess
import sys

ERROR = 507899        # ACL_ERROR_INTERNAL_ERROR: what every function returns that is not named below

# functions whose result is a pointer, and those that log, profile or tidy up: NULL and 0
POINTERS = {"aclCreateDataBuffer", "aclCreateTensorDesc", "aclopCreateAttr", "aclGetRecentErrMsg"}
HARMLESS = {"MsprofGetHashId", "MsprofRegisterCallback", "MsprofReportAdditionalInfo", "MsprofReportApi",
            "MsprofReportCompactInfo", "MsprofSysCycleTime", "aclAppLog", "aclopDestroyAttr", "aclDestroyTensorDesc",
            "aclDestroyDataBuffer", "aclInit", "aclFinalize", "aclrtResetDevice", "aclrtRecordEvent",
            "aclrtStreamWaitEvent", "aclrtDestroyEvent", "aclrtSynchronizeEvent", "aclrtResetEvent",
            "aclrtDestroyStream", "aclrtSynchronizeStream", "aclrtSetCurrentContext", "aclmdlInitDump",
            "aclmdlFinalizeDump"}

# one device, number 0, with any number of streams and events
DEVICE = {
    "aclrtGetSocName": 'const char* aclrtGetSocName() { return "Ascend910B1"; }',
    "aclrtGetDevice": "long aclrtGetDevice(int* device) { *device = 0; return 0; }",
    "aclrtSetDevice": f"long aclrtSetDevice(int device) {{ return device ? {ERROR} : 0; }}",
    "aclrtGetDeviceCount": "long aclrtGetDeviceCount(unsigned* n) { *n = 1; return 0; }",
    "aclrtCreateStream": "long aclrtCreateStream(void** stream) { *stream = &handles[0]; return 0; }",
    "aclrtCreateStreamWithConfig": "long aclrtCreateStreamWithConfig(void** stream)"
                                   " { static int next = 3; *stream = &handles[next++ % 4096]; return 0; }",
    "aclrtGetCurrentContext": "long aclrtGetCurrentContext(void** context) { *context = &handles[1]; return 0; }",
    "aclrtCreateEventExWithFlag": "long aclrtCreateEventExWithFlag(void** event) { *event = &handles[2]; return 0; }",
}
# not linked against but looked up by name (dlsym)
LOOKED_UP = [
    "long aclrtCreateEventWithFlag(void** event) { *event = &handles[2]; return 0; }",
    "long aclrtQueryEventStatus(void* event, int* status) { *status = 1; return 0; }",
    "long aclrtQueryEventWaitStatus(void* event, int* status) { *status = 1; return 0; }",
    "long aclrtStreamQuery(void* stream, int* status) { *status = 1; return 0; }",
    "long aclrtGetStreamId(void* stream, int* id) { *id = 0; return 0; }",
    "long aclrtGetCurrentDevice(int* device) { *device = 0; return 0; }",
    "long aclrtGetSysParamOpt(int option, long* value) { *value = 0; return 0; }",
    "long aclrtCtxGetSysParamOpt(int option, long* value) { *value = 0; return 0; }",
    "long aclrtGetDeviceResLimit(int device, int type, unsigned* value) { *value = 24; return 0; }",
    *(f"long {name}() {{ return 0; }}" for name in (
        "aclrtSynchronizeDevice", "aclrtSynchronizeDeviceWithTimeout", "aclrtSynchronizeStreamWithTimeout",
        "aclrtSetStreamFailureMode", "aclrtCtxSetSysParamOpt", "aclrtSetSysParamOpt", "aclrtSetOpExecuteTimeOut",
        "aclrtSetOpWaitTimeout", "aclrtSetDeviceSatMode")),
]
COMPILER = [
    "long aclSetCompileopt() { return 0; }",
    "unsigned long aclGetCompileoptSize() { return 64; }",
    "long aclGetCompileopt(int option, char* value, unsigned long n) { if (n) value[0] = 0; return 0; }",
]
SYSTEM = ("libc.", "libm.", "libstdc++", "libgcc", "libdl", "libpthread", "librt", "ld-linux")


def symbols(library, kind):
    """Names in a library's dynamic table. kind: --defined-only or --undefined-only; weak ones are not undefined."""
    lines = subprocess.run(["nm", "-D", kind, library], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [(line.split()[-1].split("@")[0], line.split()[-2]) for line in lines]
    return {name for name, letter in names if kind == "--defined-only" or letter == "U"}


def needed_libraries(library):
    lines = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split("[")[1].split("]")[0] for line in lines if "(NEEDED)" in line}


def what_is_missing(site):
    """(functions, libraries) that torch_npu's own libraries ask for and neither torch nor the system holds."""
    npu = glob.glob(f"{site}/torch_npu/lib/*.so") + glob.glob(f"{site}/torch_npu/_C*.so")
    npu = [library for library in npu if "atb" not in library]         # an optional plugin, loaded on demand
    torch_folder = os.path.dirname(importlib.util.find_spec("torch").origin)
    present = npu + glob.glob(f"{torch_folder}/lib/*.so*")
    libraries = set().union(*map(needed_libraries, npu)) - {os.path.basename(library) for library in present}
    libraries = {name for name in libraries if not name.startswith(SYSTEM)}
    defined = set().union(*(symbols(library, "--defined-only") for library in present))
    wanted = set().union(*(symbols(library, "--undefined-only") for library in npu)) - defined
    return {name for name in wanted if name.startswith(("acl", "rt", "Msprof"))}, libraries


def source(functions):
    """C text of libascendcl.so."""
    lines = ["static char handles[4096];", *LOOKED_UP]
    for name in sorted(functions):
        result = "return (void*)0;" if name in POINTERS else "return 0;" if name in HARMLESS else f"return {ERROR};"
        kind = "void*" if name in POINTERS else "long"
        lines.append(DEVICE.get(name, f"{kind} {name}() {{ {result} }}"))
    return "\n".join(lines) + "\n"


def build(site, out):
    """Writes one library for each that is missing; returns (number of functions, names of libraries)."""
    os.makedirs(out, exist_ok=True)
    functions, libraries = what_is_missing(site)
    compiler = "\n".join(["static char handles[4096];", *LOOKED_UP, *COMPILER]) + "\n"
    texts = {"libascendcl.so": source(functions), "libacl_op_compiler.so": compiler}
    for library in sorted(libraries):
        with open(f"{out}/{library}.c", "w") as file:
            file.write(texts.get(library, ""))
        subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", f"{out}/{library}", f"{out}/{library}.c",
                        f"-Wl,-soname,{library}"], check=True)
    return len(functions), sorted(libraries)


if __name__ == "__main__":
    count, names = build(*sys.argv[1:])
    print(count, "functions;", *names)
