//! Where each field of a struct lies, as data, so that a test can compare it with the tables in `docs/formats/`.

/// A field: its name, its offset in bytes, its size in bytes.
pub type Field = (&'static str, usize, usize);

/// Size of the field that `_get` borrows.
pub(crate) const fn field_bytes<T, F>(_get: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Sum of the sizes of `fields`.
pub(crate) const fn sum_bytes(mut fields: &[Field]) -> usize {
    let mut sum = 0_usize;
    while let [field, rest @ ..] = fields {
        sum = sum.saturating_add(field.2);
        fields = rest;
    }
    sum
}

/// Gives a struct a public `LAYOUT`; does not compile when a field is left out or there is padding.
macro_rules! layout {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl $name {
            /// Its fields, in order.
            pub const LAYOUT: &'static [$crate::layout::Field] = &[$((
                stringify!($field),
                core::mem::offset_of!($name, $field),
                $crate::layout::field_bytes(|value: &$name| &value.$field),
            )),*];
        }
        const _: () = assert!($crate::layout::sum_bytes($name::LAYOUT) == size_of::<$name>());
    };
}
pub(crate) use layout;

/// The checksum of a header whose last four bytes hold it: crc32c of all bytes before them.
pub(crate) fn header_crc(header: &[u8]) -> u32 {
    crc32c::crc32c(header.get(..header.len().saturating_sub(4)).unwrap_or(header))
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
