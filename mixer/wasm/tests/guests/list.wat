;; Takes listentry. What it does is said by the first letter of the value:
;; o: ok, n: not found, d: a direct response, b: a code that is none, e: an error, t: a trap, l: a loop without end,
;; g: memory without end, a: an answer as long as its memory, p: ok, and a line in the log with the clock behind it.
;; `configure` refuses parameters that begin with `{"bad`.
(module
  (import "lateen:adapter/host@0.1.0" "log" (func $log (param i32 i32 i32)))
  (import "lateen:adapter/host@0.1.0" "now" (func $now (result i64)))
  (memory (export "memory") 2)
  (global $top (mut i32) (i32.const 4096))
  (data (i32.const 16) "not on the list")
  (data (i32.const 48) "sorry")
  (data (i32.const 64) "x-guest")
  (data (i32.const 80) "teapot")
  (data (i32.const 96) "bad is no parameter")
  ;; headers of the direct response: one pair
  (data (i32.const 128) "\40\00\00\00\07\00\00\00\50\00\00\00\06\00\00\00")
  (func (export "cabi_realloc") (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.sub (local.get $align) (i32.const 1)))
                            (i32.sub (i32.const 0) (local.get $align))))
    (global.set $top (i32.add (local.get $at) (local.get $size)))
    (block $fits
      (br_if $fits (i32.le_u (global.get $top) (i32.mul (memory.size) (i32.const 65536))))
      (drop (memory.grow (i32.add (i32.div_u (local.get $size) (i32.const 65536)) (i32.const 1)))))
    (local.get $at))
  (func (export "lateen:adapter/handler@0.1.0#configure") (param $at i32) (param $len i32) (param i32 i32) (result i32)
    (i64.store (i32.const 256) (i64.const 0))
    ;; {"bad
    (if (i32.and (i32.ge_u (local.get $len) (i32.const 5))
                 (i32.eq (i32.load (i32.add (local.get $at) (i32.const 1))) (i32.const 0x64616222)))
      (then
        (i32.store8 (i32.const 256) (i32.const 1))
        (i32.store (i32.const 260) (i32.const 272))
        (i32.store (i32.const 264) (i32.const 1))
        (i32.store (i32.const 272) (i32.const 96))
        (i32.store (i32.const 276) (i32.const 19))))
    (i32.const 256))
  (func (export "lateen:adapter/listentry@0.1.0#handle")
    (param $name i32) (param $name_len i32) (param $has i32) (param $case i32) (param $value i64) (param $value_len i32)
    (result i32)
    (local $letter i32)
    (memory.fill (i32.const 512) (i32.const 0) (i32.const 72))
    (if (i32.and (local.get $has) (i32.eqz (local.get $case)))
      (then (local.set $letter (i32.load8_u (i32.wrap_i64 (local.get $value))))))
    ;; valid for 1500 ms and 7 uses
    (i32.store8 (i32.add (i32.const 520) (i32.const 40)) (i32.const 1))
    (i64.store (i32.add (i32.const 520) (i32.const 48)) (i64.const 1500))
    (i32.store8 (i32.add (i32.const 520) (i32.const 56)) (i32.const 1))
    (i32.store (i32.add (i32.const 520) (i32.const 60)) (i32.const 7))
    (if (i32.eq (local.get $letter) (i32.const 0x6e)) ;; n
      (then
        (i32.store (i32.const 520) (i32.const 5))
        (i32.store (i32.const 524) (i32.const 16))
        (i32.store (i32.const 528) (i32.const 15))))
    (if (i32.eq (local.get $letter) (i32.const 0x64)) ;; d
      (then
        (i32.store (i32.const 520) (i32.const 7))
        (i32.store8 (i32.const 532) (i32.const 1))
        (i32.store (i32.const 536) (i32.const 418))
        (i32.store (i32.const 540) (i32.const 80))
        (i32.store (i32.const 544) (i32.const 6))
        (i32.store (i32.const 548) (i32.const 128))
        (i32.store (i32.const 552) (i32.const 1))))
    (if (i32.eq (local.get $letter) (i32.const 0x62)) ;; b
      (then (i32.store (i32.const 520) (i32.const 99))))
    (if (i32.eq (local.get $letter) (i32.const 0x65)) ;; e
      (then
        (i32.store8 (i32.const 512) (i32.const 1))
        (i32.store (i32.const 520) (i32.const 48))
        (i32.store (i32.const 524) (i32.const 5))))
    (if (i32.eq (local.get $letter) (i32.const 0x74)) ;; t
      (then (unreachable)))
    (if (i32.eq (local.get $letter) (i32.const 0x6c)) ;; l
      (then (loop $forever (br $forever))))
    (if (i32.eq (local.get $letter) (i32.const 0x67)) ;; g
      (then
        (loop $more
          (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))
        (unreachable)))
    (if (i32.eq (local.get $letter) (i32.const 0x61)) ;; a
      (then
        (drop (memory.grow (i32.const 512)))
        (i32.store (i32.const 520) (i32.const 5))
        (memory.fill (i32.const 8192) (i32.const 0x61) (i32.const 30000000))
        (i32.store (i32.const 524) (i32.const 8192))
        (i32.store (i32.const 528) (i32.const 30000000))))
    (if (i32.eq (local.get $letter) (i32.const 0x70)) ;; p
      (then
        (call $log (i32.const 2) (i32.const 16) (i32.const 15))
        (i64.store (i32.add (i32.const 520) (i32.const 48)) (call $now))))
    (i32.const 512))
  (func (export "cabi_post_lateen:adapter/listentry@0.1.0#handle") (param i32)
    (global.set $top (i32.const 4096))))
