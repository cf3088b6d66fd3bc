//! Embeds the eBPF object when `cargo xtask build` says where it is. A plain `cargo build` needs no BPF toolchain; its
//! binary has the tun rung only and says so.

use std::{env, fs, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=OVERLAY_EBPF_OBJECT");
    println!("cargo::rustc-check-cfg=cfg(ebpf_embedded)");
    let Some(object) = env::var_os("OVERLAY_EBPF_OBJECT").map(PathBuf::from) else {
        return ExitCode::SUCCESS;
    };
    println!("cargo::rerun-if-changed={}", object.display());
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set: build with cargo");
        return ExitCode::FAILURE;
    };
    if let Err(error) = fs::copy(&object, out.join("overlay-ebpf.o")) {
        println!("cargo::error=copy the eBPF object {} of OVERLAY_EBPF_OBJECT: {error}", object.display());
        return ExitCode::FAILURE;
    }
    println!("cargo::rustc-cfg=ebpf_embedded");
    ExitCode::SUCCESS
}
