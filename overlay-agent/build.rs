//! Embeds the eBPF object when `cargo xtask build` says where it is. A plain `cargo build` needs no BPF toolchain; its
//! binary has the tun rung only and says so.

use std::{env, fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=OVERLAY_EBPF_OBJECT");
    println!("cargo::rustc-check-cfg=cfg(ebpf_embedded)");
    let Some(object) = env::var_os("OVERLAY_EBPF_OBJECT").map(PathBuf::from) else {
        return ExitCode::SUCCESS;
    };
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set: build with cargo");
        return ExitCode::FAILURE;
    };
    // The programs of virtual service addresses are an object beside it.
    let service_object = object.with_file_name("service-ebpf");
    for (object, name) in [(object, "overlay-ebpf.o"), (service_object, "service-ebpf.o")] {
        println!("cargo::rerun-if-changed={}", object.display());
        if let Err(error) = fs::copy(&object, out.join(name)) {
            println!("cargo::error=copy the eBPF object {} (OVERLAY_EBPF_OBJECT): {error}", object.display());
            return ExitCode::FAILURE;
        }
    }
    println!("cargo::rustc-cfg=ebpf_embedded");
    ExitCode::SUCCESS
}
