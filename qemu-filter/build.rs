//! Link arguments of `libcdp_filter.so`.

fn main() {
    // QEMU closes a module whose stamp it does not know; our code must stay mapped all the same.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
}
